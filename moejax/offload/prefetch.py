"""Prefetch: while layer l computes, fetch what layer l + 1 is predicted to want.

Fetched experts land in buffers of their own that travel through the scan over layers; at the start
of the next layer those that it wants enter the slot cache and the others are forgotten, so a wrong
prediction costs link time but never displaces a useful row. When all slots hold experts that the
layer wants, landed ones wait until those have been computed (`work.sort_experts`; not in mode
`always`, where they are forgotten too). With admission lanes may also bring what nobody predicts,
and what landed may stay unwanted (`admission`).

Axis letters:
    T  tokens    E  experts of this rank    L  MoE layers    N  granules    m  prefetch lanes
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.structs import Routing
from moejax.experts.shard import first_expert
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.vma import vary_together
from moejax.offload.admission import is_worth_moving, is_worth_slot, rank_by_average
from moejax.offload.policies import Policy
from moejax.offload.slots import (
    SlotCache,
    SlotTable,
    assign,
    choose_slot,
    layer_slot_of,
    write_row,
)
from moejax.offload.source import Source
from moejax.routing.losses import valid_tokens

# (x [T, D], routing over all experts, layer, predictor state) -> (scores [T, E_all] of layer + 1,
# predictor state). See `moejax.predictors`.
Scorer = Callable[[jax.Array, Routing, jax.Array, Any], tuple[jax.Array, Any]]
FetchMode = Literal["missing", "always"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookAhead:
    """How the next layer's experts are predicted and fetched."""

    scorer: Scorer | None  # None predicts nothing
    source: Source
    mode: FetchMode
    admission: bool  # lanes that no prediction wants admit, see `admission`
    axis: str | None  # mesh axis that the experts are sharded over


@struct.dataclass(kw_only=True)
class Landing:
    """What was fetched for the coming layer, one tuple entry per lane."""

    granule: jax.Array  # int32 [m], -1 for a lane that fetched nothing
    experts: tuple[GatedWeights, ...]  # leaves without leading axis


def init_landing(experts: GatedWeights, lanes: int) -> Landing:
    """Empty lanes for a store with leaves [L, E, ...]."""
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[2:], leaf.dtype), experts)
    return Landing(granule=jnp.full((lanes,), -1, jnp.int32), experts=tuple([empty] * lanes))


def demand(scores: jax.Array, valid: jax.Array, top_k: int) -> jax.Array:
    """float32 [E]: predicted number of assignments per expert, ties broken by score.

    Each valid token (bool [T]) votes for the `top_k` experts it scores highest with `1 + softmax`,
    and for the others with its softmax alone.
    """
    scores = scores.astype(jnp.float32)
    # Compared by score: softmax underflows to ties.
    kth = jax.lax.top_k(scores, top_k)[0][:, -1:]
    votes = jax.nn.softmax(scores, axis=-1) + (scores >= kth).astype(jnp.float32)
    return jnp.sum(jnp.where(valid[:, None], votes, 0.0), axis=0)


def landed_experts(landing: Landing, layer: jax.Array, num_experts: int) -> jax.Array:
    """bool [E]: the experts of `layer` that have landed."""
    expert = jnp.arange(num_experts, dtype=jnp.int32)
    return (landing.granule[:, None] == layer * num_experts + expert[None]).any(0)


def absorb(
    cache: SlotCache,
    landing: Landing,
    layer: jax.Array,
    wanted: jax.Array,
    keep: jax.Array,
    policy: Policy,
    *,
    admission: bool = False,
) -> tuple[SlotCache, jax.Array]:
    """Moves landed experts of `layer` that are `wanted` (bool [E]) into the cache, where absent.

    They only take slots that hold no expert to `keep` (bool [E]). With `admission` others enter in
    place of any with a lower average. Returns the cache and how many experts entered it.
    """
    size = wanted.shape[0]
    with jax.named_scope("offload_absorb"):
        local = landing.granule - layer * size
        ours = (local >= 0) & (local < size)
        local = jnp.clip(local, 0, size - 1)
        absent = cache.table.slot_of[jnp.maximum(landing.granule, 0)] < 0
        # Wrong predictions are most of what lands: no slot is looked for on their behalf.
        asks = (ours & absent & (wanted[local] | admission)).astype(jnp.int32)
        nothing, used, _ = vary_together(jnp.int32(0), jnp.int32(0), asks)
        for lane, expert in enumerate(landing.experts):
            granule, table = landing.granule[lane], cache.table

            def search(_, carry, lane=lane, granule=granule, table=table):
                slot, takes = choose_slot(table, layer, policy, keep)
                if admission:
                    takes &= wanted[local[lane]] | is_worth_slot(table, slot, granule)
                return slot, takes.astype(jnp.int32)

            # Loops of at most one trip: with conds, XLA:CPU copies the cache.
            slot, takes = jax.lax.fori_loop(0, asks[lane], search, (nothing, nothing))
            put = partial(_put, slot=slot, granule=granule, expert=expert)
            cache, used = jax.lax.fori_loop(0, takes, put, cache), used + takes
    return cache, used


def _put(_, cache, *, slot, granule, expert):
    rows = write_row(cache.rows, slot, expert)
    return SlotCache(table=assign(cache.table, slot, granule), rows=rows)


def choose(
    votes: jax.Array,
    table: SlotTable,
    layer: jax.Array,
    lanes: int,
    mode: FetchMode,
    idle: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Granules to fetch for `layer + 1`, and which lanes really fetch.

    Both take the `lanes` experts with the most `votes` [E] among those not cached. `missing` moves
    only those that some token is predicted to choose (a vote of at least 1). `always` moves all, as
    a transfer under a condition cannot overlap on TPU; after the last layer these are the most used
    experts of layer 0, for the next token.

    With admission (`idle`, bool [], is given) the other lanes take the experts of the highest
    moving average, for layer 0 too; `missing` moves those that are worth it while the link is idle.
    """
    num_experts = votes.shape[0]
    target, is_last, cached = _next_layer(table, layer, num_experts)
    votes = jnp.where(is_last, 0.0, votes)
    if idle is not None:
        votes = rank_by_average(votes, table, target)
    elif mode == "always":
        start = (target * num_experts,)
        uses = jax.lax.dynamic_slice(table.usage.uses, start, (num_experts,))
        votes = jnp.where(is_last, uses.astype(jnp.float32), votes)
    vote, expert = jax.lax.top_k(jnp.where(cached, -jnp.inf, votes), lanes)
    granule = target * num_experts + expert.astype(jnp.int32)
    if mode == "always":
        return granule, jnp.ones((lanes,), bool)
    live = vote >= 1.0
    if idle is not None:
        live |= idle & is_worth_moving(table, target, granule)
    return granule, live


def predicted(votes: jax.Array, table: SlotTable, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The granules [E] of `layer + 1`, and which some token is predicted to choose and miss."""
    num_experts = votes.shape[0]
    target, is_last, cached = _next_layer(table, layer, num_experts)
    granules = target * num_experts + jnp.arange(num_experts, dtype=jnp.int32)
    return granules, (votes >= 1.0) & ~cached & ~is_last


def _next_layer(table, layer, num_experts):
    """The layer to come (0 after the last), whether there is none, and what is cached of it."""
    is_last = (layer + 1) * num_experts == table.slot_of.shape[0]
    target = jnp.where(is_last, 0, layer + 1)
    return target, is_last, layer_slot_of(table, target, num_experts) >= 0


def fetch(
    source: Source, landing: Landing, granule: jax.Array, live: jax.Array, mode: FetchMode
) -> Landing:
    """Starts the transfers of `granule` [m]."""
    experts = []
    for lane, old in enumerate(landing.experts):
        if mode == "always":
            experts.append(source.fetch(granule[lane]))
            continue

        def bring(trip, old, lane=lane):
            # A row that is the same in every trip would be fetched before the loop, live or not.
            return source.fetch(granule[lane] + trip)

        experts.append(jax.lax.fori_loop(0, live[lane].astype(jnp.int32), bring, old))
    return Landing(granule=jnp.where(live, granule, -1), experts=tuple(experts))


def look_ahead(
    how: LookAhead,
    x: jax.Array,
    routing: Routing,
    layer: jax.Array,
    table: SlotTable,
    landing: Landing,
    predictor: Any,
    idle: jax.Array,
) -> tuple[Landing, Any]:
    """Predicts what `layer + 1` wants and starts to fetch what `table` says is not cached.

    What is predicted is announced to the source, also where there are no lanes to fetch it. x is
    [T, D], `routing` that of all ranks, `idle` (bool []) whether admissions may use the link.
    Returns what was fetched and the predictor's state. Cost: one transfer of an expert per live
    lane.
    """
    num_experts, lanes = how.source.num_experts, len(landing.experts)
    if how.scorer is None and not how.admission:
        nothing = jnp.full_like(landing.granule, -1)
        return dataclasses.replace(landing, granule=nothing), predictor
    with jax.named_scope("offload_prefetch"):
        votes = jnp.zeros((num_experts,), jnp.float32)
        if how.scorer is not None:
            scores, predictor = how.scorer(x, routing, layer, predictor)
            valid = valid_tokens(routing, scores.shape[1])
            votes = demand(scores, valid, routing.topk_idx.shape[1])
            start = first_expert(how.axis, num_experts)
            votes = jax.lax.dynamic_slice(votes, (start,), (num_experts,))
            how.source.announce(*predicted(votes, table, layer))
        if lanes == 0:
            return landing, predictor
        admits = idle if how.admission else None
        granule, live = choose(votes, table, layer, lanes, how.mode, admits)
        return fetch(how.source, landing, granule, live, how.mode), predictor
