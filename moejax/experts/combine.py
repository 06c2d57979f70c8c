"""The weighted sum that ends an MoE layer.

Axis letters:
    T  tokens    K  experts per token    D  model dim
"""

import jax
import jax.numpy as jnp


def combine(outputs: jax.Array, topk_weights: jax.Array) -> jax.Array:
    """Weighted sum over k of outputs [T, K, D], float32 inside, first choice first."""
    weights = topk_weights.astype(jnp.float32)
    total = outputs[:, 0].astype(jnp.float32) * weights[:, 0, None]
    for k in range(1, outputs.shape[1]):
        total = total + outputs[:, k].astype(jnp.float32) * weights[:, k, None]
    return total.astype(outputs.dtype)
