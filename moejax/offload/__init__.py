"""Experts in host memory, served to the device by a compiled slot cache."""
