"""The grouped gated MLP as three grouped products of tokamax, on GPU and TPU."""

import jax
import jax.numpy as jnp

from moejax.kernels.grouped_ffn.weights import GatedWeights, check_shapes, hidden_fn
from moejax.kernels.grouped_matmul.tokamax import grouped_matmul
from moejax.kernels.quantized import is_quantized


def grouped_ffn(
    xs: jax.Array,
    weights: GatedWeights,
    group_sizes: jax.Array,
    *,
    group_rows: jax.Array | None = None,
) -> jax.Array:
    """See `api.grouped_ffn`. Refuses `group_rows`: tokamax reads group g from row g."""
    check_shapes(xs, weights, group_sizes, group_rows)
    hidden_of = hidden_fn(weights.activation)
    if group_rows is not None:
        raise NotImplementedError("tokamax.ragged_dot has no group_rows")
    if is_quantized(weights):
        raise NotImplementedError("tokamax.ragged_dot does not read our words of quantised values")
    if weights.b_gate is not None:
        raise NotImplementedError("tokamax.ragged_dot has no biases")
    gate = grouped_matmul(xs, weights.w_gate, group_sizes, preferred_element_type=jnp.float32)
    up = grouped_matmul(xs, weights.w_up, group_sizes, preferred_element_type=jnp.float32)
    hidden = hidden_of(gate, up).astype(xs.dtype)
    return grouped_matmul(hidden, weights.w_down, group_sizes, preferred_element_type=xs.dtype)
