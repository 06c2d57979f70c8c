"""Copies of an expert stay copies: each gets the gradient of all of them.

Equal parameters, equal optimizer state and equal gradients give equal updates, to the bit. The
gradients are equal because they come out of one all-reduce.

Axis letters:
    P  physical slots    E  experts    R  ranks that slots are spread over
    X  slots beyond one per expert, P - E; at most so many experts have several copies
"""

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from moejax.core.structs import ExpertPlacement
from moejax.dispatch.ranks import Axis
from moejax.experts.shard import first_expert

Tree = TypeVar("Tree")


def sum_replica_gradients(grads: Tree, placement: ExpertPlacement, axis: Axis | None) -> Tree:
    """Gradients of this rank's slots, leaves [P / R, ...], summed over the copies of each expert.

    Inside `shard_map` with slots sharded over `axis`, for one layer. Those of experts with one copy
    pass unchanged. Cost: one all-reduce of X float32 experts, whatever E is; nothing for X = 0.
    """
    spare = placement.num_slots - placement.num_experts
    if spare == 0:
        return grads
    copied = jnp.asarray(placement.num_replicas) > 1
    index = jnp.where(copied, jnp.cumsum(copied, dtype=jnp.int32) - 1, spare)  # [E]
    index = index[jnp.asarray(placement.phys_to_log)]  # [P]

    def add(leaf: jax.Array) -> jax.Array:
        num_local = leaf.shape[0]
        mine = jax.lax.dynamic_slice_in_dim(index, first_expert(axis, num_local), num_local)
        sums = jnp.zeros((spare, *leaf.shape[1:]), jnp.float32)
        sums = sums.at[mine].add(leaf.astype(jnp.float32), mode="drop")
        sums = sums if axis is None else jax.lax.psum(sums, axis)
        total = sums.at[mine].get(mode="clip").astype(leaf.dtype)
        return jnp.where((mine < spare).reshape(-1, *[1] * (leaf.ndim - 1)), total, leaf)

    with jax.named_scope("moe_sum_replicas"):
        return jax.tree.map(add, grads)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def tie_replicas(axis: Axis | None, placement: ExpertPlacement, weights: Tree) -> Tree:
    """The weights as they are; backward, `sum_replica_gradients`."""
    del axis, placement
    return weights


def _tie_fwd(axis, placement, weights):
    return tie_replicas(axis, placement, weights), placement


def _tie_bwd(axis, placement, grads):
    return None, sum_replica_gradients(grads, placement, axis)


tie_replicas.defvjp(_tie_fwd, _tie_bwd)
