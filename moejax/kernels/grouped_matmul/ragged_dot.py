"""The grouped product on `jax.lax.ragged_dot`.

Right everywhere, fast where the compiler has a kernel for it (TPU). On CPU, and on GPU without
autotuning, it expands to one dense product per group: G times the work.
"""

import jax
import jax.numpy as jnp

from moejax.kernels.grouped_matmul.operands import check_shapes, result_dtype


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    group_offset: jax.Array | None = None,
    preferred_element_type: jnp.dtype | None = None,
) -> jax.Array:
    """See `api.grouped_matmul`. Refuses `group_offset` and operands of different dtypes."""
    check_shapes(lhs, rhs, group_sizes, group_offset)
    if group_offset is not None:
        raise NotImplementedError("ragged_dot has no group_offset on any backend")
    if lhs.dtype != rhs.dtype:
        raise NotImplementedError(f"lhs is {lhs.dtype} and rhs is {rhs.dtype}")
    dtype = result_dtype(lhs, rhs, preferred_element_type)
    sizes = group_sizes.astype(jnp.int32)
    y = jax.lax.ragged_dot(lhs, rhs, sizes, preferred_element_type=jnp.float32)
    # Backends differ on rows past the last group; the contract says zero.
    used = jnp.arange(lhs.shape[0])[:, None] < jnp.sum(sizes)
    return jnp.where(used, y, 0).astype(dtype)
