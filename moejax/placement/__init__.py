"""Who holds which expert: placements built and checked, solvers (numpy in and out)."""
