"""Dispatch that moves experts instead of tokens: the hottest are copied to every rank for a layer.

    load of all ranks ─► t hottest ids ─► gather_experts ─► serve own tokens; the rest elsewhere

Hecate (fully sharded sparse data parallelism, arXiv 2502.02581): parameters and optimizer state
stay sharded, a layer materialises the experts it wants (sparse all-gather) and releases them; the
gradients of the copies are summed at home (sparse reduce-scatter), which is the transpose. Copies
are made again in the backward pass, never kept.

Axis letters:
    T  tokens of this rank    K  experts per token    E  experts    R  ranks on the axis
    t  experts materialised    D  model dim
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.dispatch.ranks import (
    Axis,
    combined,
    experts_per_rank,
    local_choices,
    total_counts,
)
from moejax.experts.shard import first_expert
from moejax.experts.stage import Stage, StageCounts, resident
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.routing.losses import expert_load


def gather_experts(weights: Any, ids: jax.Array, axis: Axis) -> Any:
    """Copies of the experts `ids` (int32 [t], traced, equal on all ranks) on every rank.

    `weights` is a tree of this rank's experts [E / R, ...]; returns leaves [t, ...]. Its gradient
    is the sum over ranks at each expert's home. Cost: one all-reduce of t experts per leaf,
    whatever E is.
    """

    def gather(leaf: jax.Array) -> jax.Array:
        local = ids - first_expert(axis, leaf.shape[0])
        local = jnp.where((local >= 0) & (local < leaf.shape[0]), local, leaf.shape[0])
        return jax.lax.psum(leaf.at[local].get(mode="fill", fill_value=0), axis)

    with jax.named_scope("moe_materialize"):
        return jax.tree.map(gather, weights)


def hottest(load: jax.Array, num_copies: int) -> jax.Array:
    """int32 [t]: ids of the most loaded experts, ties to the lower id."""
    return jax.lax.top_k(load, num_copies)[1].astype(jnp.int32)


def materialize(
    rest: Stage | None = None,
    inner: Stage = resident,
    *,
    num_experts: int,
    num_copies: int,
    axis: Axis = "expert",
    token_axes: tuple[str, ...] = ("expert",),
) -> Stage:
    """The stage that serves the `num_copies` hottest experts of this batch where the tokens are.

    For use inside `shard_map` with tokens and experts sharded over `axis`. `rest` is the dispatch
    of all other assignments, with the same experts; without one they are dropped and counted.
    `inner` serves the copies. Returns combined rows [T, D]. Cost: one all-reduce of t experts in
    the forward pass, two in the backward pass; what `rest` moves.
    """
    check(
        1 <= num_copies <= num_experts,
        f"num_copies={num_copies} must be between 1 and num_experts={num_experts}",
    )

    def stage(
        x: jax.Array, routing: Routing, weights: Any, layer: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, StageCounts]:
        experts_per_rank(num_experts, axis, weights)
        # Every rank must agree on the ids, also across axes that experts are replicated over.
        ids = hottest(expert_load(routing, num_experts, token_axes), num_copies)
        copy = jnp.full((num_experts + 1,), num_copies, jnp.int32)
        copy = copy.at[ids].set(jnp.arange(num_copies, dtype=jnp.int32))[routing.topk_idx]
        served = copy < num_copies

        def serve(x: jax.Array, topk_weights: jax.Array, weights: GatedWeights):
            chosen = local_choices(routing, copy, topk_weights)
            copies = gather_experts(weights, ids, axis)
            outputs, _, counts = inner(x, chosen, copies, layer, None)
            return combined(outputs, topk_weights), counts

        y, counts = jax.checkpoint(serve)(x, routing.topk_weights, weights)
        left = jnp.sum(~served & (routing.topk_idx < num_experts))
        if rest is None:
            return y.astype(x.dtype), state, total_counts(counts, token_axes, dropped=left)
        others = dataclasses.replace(
            routing, topk_idx=jnp.where(served, num_experts, routing.topk_idx)
        )
        outputs, state, rest_counts = rest(x, others, weights, layer, state)
        y = y + combined(outputs, routing.topk_weights)
        counts = jax.tree.map(jnp.add, total_counts(counts, token_axes), rest_counts)
        return y.astype(x.dtype), state, counts

    return stage
