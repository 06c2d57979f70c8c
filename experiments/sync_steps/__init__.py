"""The parts of `experiments/sync_methods.py`, one file each."""
