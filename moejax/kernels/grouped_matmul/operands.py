"""What all implementations of the grouped product check and compute alike.

Axis letters:
    M  rows      K  inner dim      N  outer dim      G  groups of rhs      Gtot  groups of all rows
"""

import jax
import jax.numpy as jnp
from jax import lax

from moejax.core.errors import check


def check_shapes(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, group_offset: jax.Array | None
) -> None:
    """Raises `InputError` unless the operands fit together."""
    check(lhs.ndim == 2, f"lhs has shape {lhs.shape}, expected [M, K]")
    check(rhs.ndim == 3, f"rhs has shape {rhs.shape}, expected [G, K, N]")
    check(lhs.shape[1] == rhs.shape[1], f"lhs has shape {lhs.shape}, rhs has {rhs.shape}")
    check(group_sizes.ndim == 1, f"group_sizes has shape {group_sizes.shape}, expected [Gtot]")
    groups, total = rhs.shape[0], group_sizes.shape[0]
    check(
        jnp.issubdtype(group_sizes.dtype, jnp.integer),
        f"group_sizes is {group_sizes.dtype}, expected int32",
    )
    if group_offset is None:
        check(total == groups, f"{total} group_sizes for {groups} groups, and no group_offset")
    else:
        check(total >= groups, f"{total} group_sizes for {groups} groups of rhs")
        check(
            jnp.issubdtype(group_offset.dtype, jnp.integer) and group_offset.size == 1,
            f"group_offset is {group_offset.dtype}{list(group_offset.shape)}, expected int32 []",
        )


def result_dtype(lhs: jax.Array, rhs: jax.Array, preferred: jnp.dtype | None) -> jnp.dtype:
    """`preferred_element_type`, or the wider of both operands."""
    if preferred is not None:
        return jnp.dtype(preferred)
    return max(lhs.dtype, rhs.dtype, key=lambda dtype: dtype.itemsize)


def local_groups(
    group_sizes: jax.Array, group_offset: jax.Array | None, num_groups: int
) -> tuple[jax.Array, jax.Array]:
    """Sizes of the groups that rhs holds (int32 [G]) and the row where the first one starts.

    As with any dynamic slice, an offset past `Gtot - G` is clamped to it.
    """
    group_sizes = group_sizes.astype(jnp.int32)
    if group_offset is None:
        return group_sizes, jnp.int32(0)
    last = group_sizes.shape[0] - num_groups
    offset = jnp.clip(group_offset.reshape(()).astype(jnp.int32), 0, last)
    before = jnp.arange(group_sizes.shape[0]) < offset
    first_row = jnp.sum(jnp.where(before, group_sizes, 0), dtype=jnp.int32)
    return lax.dynamic_slice_in_dim(group_sizes, offset, num_groups), first_row
