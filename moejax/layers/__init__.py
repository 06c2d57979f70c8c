"""Norms, attention and the mixture-of-experts layer."""
