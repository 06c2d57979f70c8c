"""Hugging Face checkpoints: read, run, written back."""
