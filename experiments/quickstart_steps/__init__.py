"""The steps of the quickstart, one file each."""
