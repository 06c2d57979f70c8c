"""Training with less communication: what is averaged over workers, when, and how it is coded."""
