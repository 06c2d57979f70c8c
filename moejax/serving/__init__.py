"""Decoding: resident or offloaded, one compiled step per token."""
