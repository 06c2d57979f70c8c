"""The parts of `experiments/hidden_predictors.py`, one file each."""
