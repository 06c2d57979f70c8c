"""moejax: mixture-of-experts models in JAX."""
