"""What things should cost: hardware tables and physical bounds, numpy only."""
