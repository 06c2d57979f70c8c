"""Experts sharded over a mesh axis with every token on every rank.

The smallest expert parallelism: each rank serves the assignments to its own experts and the outputs
are summed. No token moves, so it fits decode, where tokens are few and weights are many. Each
output row is non-zero on exactly one rank, so the sum is exact.

Axis letters:
    T  tokens    K  experts per token    E  experts of this rank    R  ranks on the axis
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from moejax.core.structs import Routing

Tree = TypeVar("Tree")


def first_expert(axis: str | tuple[str, ...] | None, num_local: int) -> jax.Array:
    """int32 []: global id of this rank's first expert; ranks hold contiguous ranges."""
    return jnp.int32(0) if axis is None else jax.lax.axis_index(axis) * num_local


def local_routing(routing: Routing, axis: str | None, num_local: int) -> Routing:
    """The routing with local ids; assignments to other ranks get the id `num_local` (no group)."""
    if axis is None:
        return routing
    idx = routing.topk_idx - first_expert(axis, num_local)
    mine = (idx >= 0) & (idx < num_local)
    return dataclasses.replace(routing, topk_idx=jnp.where(mine, idx, num_local))


def sum_ranks(tree: Tree, axis: str | None) -> Tree:
    """Sum over the ranks of `axis`. Cost: one all-reduce of each leaf."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def most_of_ranks(x: jax.Array, axis: str | None) -> jax.Array:
    """Maximum over the ranks of `axis`."""
    return x if axis is None else jax.lax.pmax(x, axis)
