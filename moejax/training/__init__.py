"""Training: loss, optimizer, and a loop that survives being killed."""
