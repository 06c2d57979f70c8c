"""Replay of recorded routing through simulated expert caches."""
