"""The parts of `experiments/predictor_effect.py`, one file each."""
