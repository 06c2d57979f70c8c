"""The offloaded expert stage: experts in host memory, a slot cache on the device.

    insert what was prefetched -> look up -> waves -> insert what found no slot before
    -> start the next layer's prefetch -> last wave

It is rank-local: under expert parallelism every rank has its own store, table and misses, nothing
collective stands inside, and only the outputs are summed.

Axis letters:
    T  tokens    K  experts per token    D  model dim    E  experts of this rank    L  MoE layers
"""

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.experts.shard import local_routing, most_of_ranks, sum_ranks
from moejax.experts.stage import Stage, StageCounts
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.offload.policies import POLICIES
from moejax.offload.prefetch import (
    FetchMode,
    Landing,
    LookAhead,
    Scorer,
    absorb,
    init_landing,
    landed_experts,
    look_ahead,
)
from moejax.offload.slots import SlotCache, init_cache, layer_slots, shared_slots, touch_layer
from moejax.offload.store import flatten
from moejax.offload.waves import (
    last_wave,
    plan_call,
    run_last,
    run_missing,
    sort_experts,
    unpermute,
)


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
        landing=init_landing(experts, cfg.prefetch_lanes),
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
    rows, (num_layers, num_experts) = flatten(store), store.w_gate.shape[:2]
    policy = POLICIES[cfg.policy]
    ahead = LookAhead(
        scorer=scorer, store=rows, num_experts=num_experts, mode=cfg.fetch_mode, axis=axis
    )

    def stage(x, routing, weights, layer, state):
        assert weights is None, "the offloaded stage brings its own experts"
        local, landing = local_routing(routing, axis, num_experts), state.landing
        wanted = (local.topk_idx.reshape(-1)[:, None] == jnp.arange(num_experts)[None]).any(0)
        table = touch_layer(state.cache.table, layer, wanted)
        cache = dataclasses.replace(state.cache, table=table)
        cache, used = absorb(cache, landing, layer, wanted, wanted, policy)
        crowded = _can_crowd(cfg, num_layers, min(local.topk_idx.size, num_experts))
        landed = landed_experts(landing, layer, num_experts) & crowded
        work = sort_experts(cache.table, layer, wanted, landed)
        call = plan_call(x, local, work, store=rows, policy=policy)
        cache, y = run_missing(call, cache)
        if crowded:
            cache, late = absorb(cache, landing, layer, work.late, last_wave(work), policy)
            used += late
        # Behind the demand transfers on the link, beside the last wave's compute.
        coming, predictor = look_ahead(
            ahead, x, routing, layer, cache.table, landing, state.predictor
        )
        y = unpermute(call, run_last(call, cache, y))
        state = OffloadState(cache=cache, landing=coming, predictor=predictor)
        return sum_ranks(y, axis), state, _counts(work, landing, used, axis)

    return stage


def _can_crowd(cfg, num_layers, most_wanted):
    """Whether a landed expert may find no slot, and then waits for the last wave.

    Not in mode `always`: the wait costs temporaries that its TPU budgets do not hold (docs/log.md).
    """
    slots = cfg.num_slots // num_layers if cfg.quota == "layer" else cfg.num_slots
    return cfg.prefetch_lanes > 0 and cfg.fetch_mode == "missing" and most_wanted > slots


def _counts(work, landing, used, axis):
    fetched = jnp.sum(landing.granule >= 0, dtype=jnp.int32)
    counts = StageCounts(
        lookups=jnp.sum(work.wanted, dtype=jnp.int32),
        hits=work.num_cached + work.num_late,
        demand_fetches=work.num_missing,
        prefetches=fetched,
        prefetches_wasted=fetched - used,
        waves=1 + work.num_missing,
    )
    waves = most_of_ranks(counts.waves, axis)
    return dataclasses.replace(sum_ranks(counts, axis), waves=waves)
