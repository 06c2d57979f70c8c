"""Permutation of assignments, obviously right: one-hot matrices and plain indexing.

Axis letters:
    T  tokens      K  groups per token      N  assignments, T * K      G  groups      D  model dim
"""

import jax
import jax.numpy as jnp

from moejax.kernels.permute.gather import Permutation


def sort_by_group(
    topk_idx: jax.Array, num_groups: int, *, group_order: jax.Array | None = None
) -> Permutation:
    """As `gather.sort_by_group`: the rank of an assignment is the number of those before it."""
    group_order = jnp.arange(num_groups) if group_order is None else group_order
    flat = topk_idx.reshape(-1)
    hit = flat[:, None] == group_order[None, :]  # [N, G]
    position = jnp.where(hit.any(1), jnp.argmax(hit, 1), num_groups)
    index = jnp.arange(flat.shape[0])
    earlier = position[None, :] < position[:, None]
    tied = (position[None, :] == position[:, None]) & (index[None, :] < index[:, None])
    inverse = jnp.sum(earlier | tied, axis=1, dtype=jnp.int32)
    order = jnp.sum(jnp.where(inverse[:, None] == index[None, :], index[:, None], 0), axis=0)
    return Permutation(
        order=order.astype(jnp.int32),
        inverse=inverse,
        group_sizes=jnp.sum(hit, axis=0, dtype=jnp.int32),
    )


def permute(x: jax.Array, perm: Permutation, top_k: int) -> jax.Array:
    """As `gather.permute`."""
    return x[perm.order // top_k]


def unpermute(y: jax.Array, perm: Permutation, topk_weights: jax.Array) -> jax.Array:
    """As `gather.unpermute`."""
    picked = y[perm.inverse].reshape(*topk_weights.shape, y.shape[-1]).astype(jnp.float32)
    return jnp.sum(picked * topk_weights[..., None].astype(jnp.float32), axis=1).astype(y.dtype)
