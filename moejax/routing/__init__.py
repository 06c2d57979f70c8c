"""Gates, their losses and their statistics."""
