"""Checkpoints that are complete or do not count, restored straight to where they belong."""
