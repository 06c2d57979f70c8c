"""The steps of `experiments.predictors`, one file each."""
