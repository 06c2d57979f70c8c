"""Collectives as data: build a schedule, prove it, run it, and read it back from what compiled."""
