"""The parts of `experiments/train.py`, one file each."""
