"""The offloaded expert stage: experts in host memory, a slot cache on the device.

    insert what was prefetched -> look up -> waves -> start the next layer's prefetch -> last wave

It is rank-local: under expert parallelism every rank has its own store, table and misses, nothing
collective stands inside, and only the outputs are summed.

Axis letters:
    T  tokens    K  experts per token    D  model dim    E  experts of this rank    L  MoE layers
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.experts.shard import first_expert, local_routing, most_of_ranks, sum_ranks
from moejax.experts.stage import Stage, StageCounts
from moejax.kernels.chunks import pick_sizes, plan_chunks, zero_tail
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.permute import permute, sort_by_group, ungroup
from moejax.kernels.rows import pad_rows
from moejax.offload import prefetch
from moejax.offload.policies import POLICIES
from moejax.offload.prefetch import FetchMode, Landing, Scorer
from moejax.offload.slots import (
    SlotCache,
    init_cache,
    layer_slot_of,
    layer_slots,
    shared_slots,
    touch_layer,
)
from moejax.offload.store import flatten
from moejax.offload.waves import Call, Work, processing_order, run_last, run_missing


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """How a rank caches and prefetches.

    Attributes:
        num_slots: experts that the device holds, per rank, all layers together.
        policy: what to evict, see `offload.policies`.
        quota: `layer` divides the slots equally over the layers, `shared` is one pool.
        prefetch_lanes: experts fetched ahead per layer, 0 for none (and no landing buffers).
        fetch_mode: see `prefetch.choose`.
    """

    num_slots: int
    policy: Literal["lru", "lfu", "random"] = "lru"
    quota: Literal["layer", "shared"] = "layer"
    prefetch_lanes: int = 0
    fetch_mode: FetchMode = "missing"

    def __post_init__(self):
        check(self.num_slots >= 1, f"num_slots={self.num_slots} must be at least 1")
        lanes = self.prefetch_lanes
        check(lanes >= 0, f"prefetch_lanes={lanes} must not be negative")
        for name, known in (
            ("policy", sorted(POLICIES)),
            ("quota", ["layer", "shared"]),
            ("fetch_mode", list(get_args(FetchMode))),
        ):
            value = getattr(self, name)
            check(value in known, f"{name}={value!r} is not one of {known}")


@struct.dataclass(kw_only=True)
class OffloadState:
    """Carry of the stage through layers and tokens; donate it to the step."""

    cache: SlotCache
    landing: Landing
    predictor: Any = None


def init_state(experts: GatedWeights, cfg: OffloadConfig, *, predictor: Any = None) -> OffloadState:
    """An empty cache for one rank's store, leaves [L, E, ...] (arrays or abstract)."""
    num_layers, num_experts = experts.w_gate.shape[:2]
    check(
        cfg.prefetch_lanes <= num_experts,
        f"prefetch_lanes={cfg.prefetch_lanes} exceeds the {num_experts} experts of a rank",
    )
    check(
        cfg.num_slots <= num_layers * num_experts,
        f"num_slots={cfg.num_slots} exceeds the {num_layers * num_experts} experts of a rank",
    )
    if cfg.quota == "layer":
        slot_layer = layer_slots(cfg.num_slots, num_layers)
    else:
        slot_layer = shared_slots(cfg.num_slots)
    return OffloadState(
        cache=init_cache(experts, slot_layer),
        landing=prefetch.init_landing(experts, cfg.prefetch_lanes),
        predictor=predictor,
    )


def offloaded(
    store: GatedWeights,
    cfg: OffloadConfig,
    *,
    scorer: Scorer | None = None,
    axis: str | None = None,
) -> Stage:
    """A stage that serves the experts of the host `store`, leaves [L, E, ...].

    Args:
        scorer: predicts the next layer's experts; None prefetches nothing.
        axis: mesh axis that the experts are sharded over, when inside `shard_map`.

    Exact: outputs are bit-equal to the resident stage's on CPU. Cost per call: one transfer of an
    expert per miss and per live prefetch lane; with `axis` one psum of [T, K, D].
    """
    rows, num_experts = flatten(store), store.w_gate.shape[1]
    policy = POLICIES[cfg.policy]
    has_lanes = cfg.prefetch_lanes > 0

    def stage(
        x: jax.Array,
        routing: Routing,
        weights: GatedWeights | None,
        layer: jax.Array,
        state: OffloadState,
    ) -> tuple[jax.Array, OffloadState, StageCounts]:
        assert weights is None, "the offloaded stage brings its own experts"
        local = local_routing(routing, axis, num_experts)
        expert = jnp.arange(num_experts)
        wanted = (local.topk_idx.reshape(-1)[:, None] == expert[None]).any(0)
        cache = dataclasses.replace(
            state.cache, table=touch_layer(state.cache.table, layer, wanted)
        )
        landing, predictor = state.landing, state.predictor
        fetched = wasted = jnp.int32(0)
        if has_lanes:
            with jax.named_scope("offload_absorb"):
                cache, fetched, wasted = prefetch.absorb(cache, landing, layer, wanted, policy)
        slot_of = layer_slot_of(cache.table, layer, num_experts)
        order, num_cached = processing_order(wanted, slot_of)
        num_wanted = jnp.sum(wanted, dtype=jnp.int32)
        work = Work(
            layer=layer,
            order=order,
            wanted=wanted,
            num_cached=num_cached,
            num_missing=num_wanted - num_cached,
        )
        call, permutation = _plan(x, local, work)
        cache, y = run_missing(call, cache)
        if has_lanes:
            # Behind the demand transfers on the link, beside the last wave's compute.
            landing, predictor = _look_ahead(x, routing, layer, cache, landing, predictor)
        y = run_last(call, cache, y)
        with jax.named_scope("moe_unpermute"):
            y = zero_tail(y, jnp.sum(permutation.group_sizes), sizes=call.sizes)
            y = ungroup(y[: local.topk_idx.size], permutation, local.topk_idx.shape[1])
        counts = StageCounts(
            lookups=num_wanted,
            hits=num_cached,
            demand_fetches=work.num_missing,
            prefetches=fetched,
            prefetches_wasted=wasted,
            waves=1 + work.num_missing,
        )
        state = OffloadState(cache=cache, landing=landing, predictor=predictor)
        counts = dataclasses.replace(
            sum_ranks(counts, axis), waves=most_of_ranks(counts.waves, axis)
        )
        return sum_ranks(y, axis), state, counts

    def _look_ahead(x, routing, layer, cache, landing, predictor):
        if scorer is None:
            return dataclasses.replace(
                landing, granule=jnp.full_like(landing.granule, -1)
            ), predictor
        with jax.named_scope("offload_prefetch"):
            scores, predictor = scorer(x, routing, layer, predictor)
            # Not column 0 alone: slicing it keeps XLA:CPU from compiling `top_k` as one op.
            valid = jnp.all(routing.topk_idx < scores.shape[1], axis=1)
            votes = prefetch.demand(scores, valid, routing.topk_idx.shape[1])
            start = first_expert(axis, num_experts)
            votes = jax.lax.dynamic_slice(votes, (start,), (num_experts,))
            granule, live = prefetch.choose(
                votes, cache.table, layer, cfg.prefetch_lanes, cfg.fetch_mode
            )
            return prefetch.fetch(rows, landing, granule, live, cfg.fetch_mode), predictor

    def _plan(x, routing, work):
        top_k, num_rows = routing.topk_idx.shape[1], routing.topk_idx.size
        sizes = pick_sizes(num_rows)
        with jax.named_scope("moe_permute"):
            permutation = sort_by_group(routing.topk_idx, num_experts, group_order=work.order)
            xs = pad_rows(permute(x, permutation, top_k), num_rows + sizes[-1])
            plan = plan_chunks(permutation.group_sizes, sizes=sizes, num_rows=num_rows)
        call = Call(store=rows, xs=xs, work=work, plan=plan, policy=policy, sizes=sizes)
        return call, permutation

    return stage
