"""How tokens reach experts on other ranks: one file per strategy, each a stage around a stage."""
