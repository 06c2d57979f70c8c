"""The grouped gated MLP, obviously right: every group computes all rows, `where` keeps its own.

Costs G times the useful work. Rows of other groups are zeroed before and after, so a non-finite
row reaches neither the values nor the gradients of another group.

Axis letters:
    M  rows      G  groups      R  rows of the weight stack      D  model dim      F  hidden dim
"""

import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.grouped_ffn.weights import GatedWeights, check_shapes, hidden_fn
from moejax.kernels.quantized import dequantize_tree
from moejax.kernels.vma import vary_together


def grouped_ffn(
    xs: jax.Array,
    weights: GatedWeights,
    group_sizes: jax.Array,
    *,
    group_rows: jax.Array | None = None,
) -> jax.Array:
    """`xs` [M, D] sorted by group -> [M, D]; rows past `sum(group_sizes)` are zero."""
    check_shapes(xs, weights, group_sizes, group_rows)
    hidden = hidden_fn(weights.activation)
    if group_rows is None:
        group_rows = jnp.arange(group_sizes.shape[0], dtype=jnp.int32)
    xs, weights, group_sizes, group_rows = vary_together(xs, weights, group_sizes, group_rows)
    row = jnp.arange(xs.shape[0])[:, None]
    ends = jnp.cumsum(group_sizes)

    def add_group(y: jax.Array, group: tuple) -> tuple[jax.Array, None]:
        start, end, index = group
        own = (row >= start) & (row < end)  # [M, 1]
        w = dequantize_tree(jax.tree.map(lambda leaf: leaf[index], weights), jnp.float32)
        w = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), w)
        x = jnp.where(own, xs.astype(jnp.float32), 0)
        with jax.default_matmul_precision("highest"):
            out = hidden(_add(x @ w.w_gate, w.b_gate), _add(x @ w.w_up, w.b_up)) @ w.w_down
        out = _add(out, w.b_down)
        return jnp.where(own, out, y), None

    zeros = jnp.zeros_like(xs, jnp.float32)
    groups = (ends - group_sizes, ends, group_rows)
    y, _ = lax.scan(add_group, vary_together(zeros, xs)[0], groups)
    return y.astype(xs.dtype)


def _add(rows, bias):
    return rows if bias is None else rows + bias[None]
