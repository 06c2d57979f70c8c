"""The grouped product, obviously right: every group multiplies all rows, `where` keeps its own.

Costs G times the useful work.

Axis letters:
    M  rows      K  inner dim      N  outer dim      G  groups of rhs      Gtot  groups of all rows
"""

import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.grouped_matmul.operands import check_shapes, local_groups, result_dtype
from moejax.kernels.vma import vary_together


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    group_offset: jax.Array | None = None,
    preferred_element_type: jnp.dtype | None = None,
) -> jax.Array:
    """`lhs` [M, K] sorted by group times `rhs` [G, K, N] -> [M, N]; see `api.grouped_matmul`."""
    check_shapes(lhs, rhs, group_sizes, group_offset)
    dtype = result_dtype(lhs, rhs, preferred_element_type)
    lhs, rhs, group_sizes, group_offset = vary_together(lhs, rhs, group_sizes, group_offset)
    sizes, first_row = local_groups(group_sizes, group_offset, rhs.shape[0])
    ends = jnp.cumsum(sizes) + first_row
    row = jnp.arange(lhs.shape[0])[:, None]

    def add_group(y: jax.Array, group: tuple) -> tuple[jax.Array, None]:
        start, end, weight = group
        own = (row >= start) & (row < end)  # [M, 1]
        x = jnp.where(own, lhs.astype(jnp.float32), 0)
        with jax.default_matmul_precision("highest"):
            return jnp.where(own, x @ weight.astype(jnp.float32), y), None

    zeros, _ = vary_together(jnp.zeros((lhs.shape[0], rhs.shape[2]), jnp.float32), lhs)
    y, _ = lax.scan(add_group, zeros, (ends - sizes, ends, rhs))
    return y.astype(dtype)
