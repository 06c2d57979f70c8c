"""Thin wrappers for other module systems."""
