"""Sorts assignments by group and moves rows there and back by gathers alone.

The transpose of a gather is a scatter-add, which is slow and, on some devices, not deterministic.
Both moves are bijections between assignments and sorted rows, so each gradient is the gather of the
other: `inverse` undoes `order`. Nothing is dropped.

Axis letters:
    T  tokens      K  groups per token      N  assignments, T * K      G  groups      D  model dim
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.kernels.vma import vary_together

# Up to so many assignments (decode) are ranked by comparing all pairs; measured, docs/kernels.md.
_FEW = 64


@struct.dataclass(kw_only=True)
class Permutation:
    """Assignments (token-major, n = t * K + k) in the order of their groups."""

    order: jax.Array  # int32 [N], assignment that sorted row n holds
    inverse: jax.Array  # int32 [N], sorted row that holds assignment n
    group_sizes: jax.Array  # int32 [G], rows per group, in the order of the rows


def sort_by_group(
    topk_idx: jax.Array, num_groups: int, *, group_order: jax.Array | None = None
) -> Permutation:
    """Stable sort of the assignments of `topk_idx` (int [T, K]) by group.

    Ids outside [0, num_groups) belong to no group: their rows come last, past
    `sum(group_sizes)`. With `group_order` (int32 [G], a permutation) the groups are laid out in
    that order and `group_sizes[p]` counts group `group_order[p]`. Cost: one sort of N integers, or
    N * N comparisons where N is small.
    """
    check(topk_idx.ndim == 2, f"topk_idx has shape {topk_idx.shape}, expected [T, K]")
    with jax.named_scope("moe_sort"):
        position = topk_idx.reshape(-1).astype(jnp.int32)  # [N]
        valid = (position >= 0) & (position < num_groups)
        if group_order is not None:
            check(
                group_order.shape == (num_groups,),
                f"group_order has shape {group_order.shape}, expected ({num_groups},)",
            )
            # Inverse of a permutation: a unique scatter, of G elements.
            rank = jnp.zeros((num_groups,), jnp.int32)
            rank = rank.at[group_order].set(jnp.arange(num_groups, dtype=jnp.int32))
            position = rank[jnp.clip(position, 0, num_groups - 1)]
        position = jnp.where(valid, position, num_groups)
        order, inverse = (_rank if position.shape[0] <= _FEW else _sort)(position)
        members = position[:, None] == jnp.arange(num_groups, dtype=jnp.int32)[None, :]
        return Permutation(
            order=order, inverse=inverse, group_sizes=jnp.sum(members, axis=0, dtype=jnp.int32)
        )


def _sort(position: jax.Array) -> tuple[jax.Array, jax.Array]:
    order = jnp.argsort(position, stable=True).astype(jnp.int32)
    assignment = jnp.arange(position.shape[0], dtype=jnp.int32)
    return order, jnp.zeros_like(order).at[order].set(assignment, unique_indices=True)


def _rank(position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `_sort` gives, as two fused loops: a sort is a call of its own, and so is a scatter."""
    n = jnp.arange(position.shape[0], dtype=jnp.int32)
    equal = position[None, :] == position[:, None]
    before = (position[None, :] < position[:, None]) | equal & (n[None, :] < n[:, None])
    inverse = jnp.sum(before, axis=1, dtype=jnp.int32)
    holds = inverse[None, :] == n[:, None]
    return jnp.sum(jnp.where(holds, n[None, :], 0), axis=1, dtype=jnp.int32), inverse


def permute(x: jax.Array, perm: Permutation, top_k: int) -> jax.Array:
    """Rows of tokens `x` [T, D] in the order of their groups: [N, D]."""
    check(
        x.shape[0] * top_k == perm.order.shape[0],
        f"x has {x.shape[0]} tokens, top_k={top_k}, permutation has {perm.order.shape[0]} rows",
    )
    with jax.named_scope("moe_permute"):
        x, perm = vary_together(x, perm)
        return _permute(x, perm.order, perm.inverse, top_k)


def unpermute(y: jax.Array, perm: Permutation, topk_weights: jax.Array) -> jax.Array:
    """Weighted sum of the rows of each token: `y` [N, D], `topk_weights` [T, K] -> [T, D].

    Summed over k in ascending k in float32, so the bits do not depend on the order of the groups;
    the result has the dtype of `y`.
    """
    check(
        topk_weights.size == perm.order.shape[0] == y.shape[0],
        f"topk_weights has shape {topk_weights.shape}, y {y.shape}, "
        f"permutation {perm.order.shape[0]} rows",
    )
    with jax.named_scope("moe_unpermute"):
        y, topk_weights, perm = vary_together(y, topk_weights, perm)
        return _unpermute(y, topk_weights, perm.order, perm.inverse)


def ungroup(y: jax.Array, perm: Permutation, top_k: int) -> jax.Array:
    """Rows back at their assignments, unweighted: `y` [N, D] -> [T, K, D]."""
    check(
        y.shape[0] == perm.order.shape[0],
        f"y has {y.shape[0]} rows, permutation has {perm.order.shape[0]}",
    )
    with jax.named_scope("moe_unpermute"):
        y, perm = vary_together(y, perm)
        rows = _reorder(y, perm.inverse, perm.order)
        return rows.reshape(-1, top_k, y.shape[1])


def _rows(a: jax.Array, index: jax.Array) -> jax.Array:
    return a.at[index].get(mode="promise_in_bounds")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _permute(x, order, inverse, top_k):
    return _rows(x, order // top_k)


def _permute_fwd(x, order, inverse, top_k):
    return _permute(x, order, inverse, top_k), inverse


def _permute_bwd(top_k, inverse, dy):
    inverse = inverse.reshape(-1, top_k)
    terms = [_rows(dy, inverse[:, k]).astype(jnp.float32) for k in range(top_k)]
    return functools.reduce(jnp.add, terms).astype(dy.dtype), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


@jax.custom_vjp
def _unpermute(y, topk_weights, order, inverse):
    inverse = inverse.reshape(topk_weights.shape)
    weights = topk_weights.astype(jnp.float32)
    terms = [
        _rows(y, inverse[:, k]).astype(jnp.float32) * weights[:, k, None]
        for k in range(topk_weights.shape[1])
    ]
    return functools.reduce(jnp.add, terms).astype(y.dtype)


def _unpermute_fwd(y, topk_weights, order, inverse):
    return _unpermute(y, topk_weights, order, inverse), (y, topk_weights, order, inverse)


def _unpermute_bwd(residuals, dout):
    y, topk_weights, order, inverse = residuals
    top_k = topk_weights.shape[1]
    weights = _rows(topk_weights.reshape(-1), order).astype(jnp.float32)
    dy = _rows(dout, order // top_k).astype(jnp.float32) * weights[:, None]
    picked = _rows(y, inverse).reshape(*topk_weights.shape, -1).astype(jnp.float32)
    d_weights = jnp.einsum("tkd,td->tk", picked, dout.astype(jnp.float32))
    return dy.astype(y.dtype), d_weights.astype(topk_weights.dtype), None, None


_unpermute.defvjp(_unpermute_fwd, _unpermute_bwd)


@jax.custom_vjp
def _reorder(y, index, inverse_index):
    return _rows(y, index)


def _reorder_fwd(y, index, inverse_index):
    return _rows(y, index), inverse_index


def _reorder_bwd(inverse_index, dy):
    return _rows(dy, inverse_index), None, None


_reorder.defvjp(_reorder_fwd, _reorder_bwd)
