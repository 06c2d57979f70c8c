"""Decoder models over the layers."""
