"""Expert parameters and their evaluation over routed rows."""
