"""Parts of `experiments.generate`."""
