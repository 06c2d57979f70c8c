"""The offloaded expert stage: experts in host memory or on disk, a slot cache on the device.

    insert what was prefetched -> look up -> waves -> insert what found no slot before
    -> start the next layer's prefetch -> last wave

It is rank-local: under expert parallelism every rank has its own store, table and misses, nothing
collective stands inside, and only the outputs are summed.

Axis letters:
    T  tokens    K  experts per token    D  model dim    E  experts of this rank    L  MoE layers
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.costmodel.miss import MissCosts
from moejax.experts.shard import local_routing, most_of_ranks, sum_ranks
from moejax.experts.stage import Stage, StageCounts
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.offload.host import pick_rows, run_on_host
from moejax.offload.misses import Serve, num_moved
from moejax.offload.policies import POLICIES, PolicyName
from moejax.offload.precision import important_experts
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
from moejax.offload.slots import (
    SlotCache,
    forget_low,
    init_cache,
    layer_slots,
    quota_slots,
    shared_slots,
    touch_layer,
)
from moejax.offload.source import HostSource, Store, source_of
from moejax.offload.waves import plan_call, run_last, run_missing, unpermute
from moejax.offload.work import last_wave, num_waves, sort_experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """How a rank caches and prefetches.

    Attributes:
        num_slots: experts that the device holds, per rank, all layers together.
        policy: what to evict, see `offload.policies`.
        quota: `layer` divides the slots equally over the layers, `shared` is one pool; a tuple says
            the slots of every layer, see `costmodel.quotas`.
        prefetch_lanes: experts fetched ahead per layer, 0 for none (and no landing buffers).
        fetch_mode: see `prefetch.choose`.
        admission: lanes that no prediction wants bring what is used most, see `admission`; wants
            the policy `average`.
        serve: who serves a miss, see `misses`.
        costs: of one expert, which `divide` divides by.
        column_parts: the store holds experts in so many parts, see `columns`; slots, lanes and
            costs are those of parts.
        importance_threshold: misses that matter less are fetched in few bits, see `precision`;
            lossy. None fetches all in full.
    """

    num_slots: int
    policy: PolicyName = "lru"
    quota: Literal["layer", "shared"] | tuple[int, ...] = "layer"
    prefetch_lanes: int = 0
    fetch_mode: FetchMode = "missing"
    admission: bool = False
    serve: Serve = "fetch"
    costs: MissCosts | None = None
    column_parts: int = 1
    importance_threshold: float | None = None

    def __post_init__(self):
        check(self.num_slots >= 1, f"num_slots={self.num_slots} must be at least 1")
        check(self.column_parts >= 1, f"column_parts={self.column_parts} must be at least 1")
        lanes = self.prefetch_lanes
        check(lanes >= 0, f"prefetch_lanes={lanes} must not be negative")
        for name, known in (
            ("policy", sorted(POLICIES)),
            ("fetch_mode", list(get_args(FetchMode))),
            ("serve", list(get_args(Serve))),
        ):
            value = getattr(self, name)
            check(value in known, f"{name}={value!r} is not one of {known}")
        self._check_quota()
        check(
            not self.admission or (lanes >= 1 and self.policy == "average"),
            f"admission wants prefetch_lanes of at least 1 and policy='average', got {lanes} and"
            f" {self.policy!r}",
        )
        check(
            (self.costs is not None) == (self.serve == "divide"),
            f"serve={self.serve!r} and costs={self.costs} do not go together",
        )
        self._check_precision()

    def _check_precision(self):
        threshold, parts = self.importance_threshold, self.column_parts
        check(
            threshold is None or math.isfinite(threshold),
            f"importance_threshold={threshold} is not finite",
        )
        check(
            threshold is None or (self.serve == "fetch" and parts == 1),
            f"importance_threshold={threshold} wants serve='fetch' and whole experts, "
            f"not serve={self.serve!r} and column_parts={parts}",
        )

    def _check_quota(self):
        quota = self.quota
        if isinstance(quota, str):
            check(quota in ("layer", "shared"), f"quota={quota!r} is not one of layer, shared")
            return
        check(len(quota) > 0 and min(quota) >= 1, f"quota={quota} has a layer without a slot")
        check(
            sum(quota) == self.num_slots,
            f"quota={quota} sums to {sum(quota)}, not to num_slots={self.num_slots}",
        )


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
    return OffloadState(
        cache=init_cache(
            experts,
            _slot_layer(cfg, num_layers),
            two_precisions=cfg.importance_threshold is not None,
        ),
        landing=init_landing(experts, cfg.prefetch_lanes),
        predictor=predictor,
    )


def _slot_layer(cfg, num_layers):
    if cfg.quota == "shared":
        return shared_slots(cfg.num_slots)
    if cfg.quota == "layer":
        return layer_slots(cfg.num_slots, num_layers)
    count = len(cfg.quota)
    check(
        count == num_layers, f"quota={cfg.quota} is of {count} layers, the model has {num_layers}"
    )
    return quota_slots(cfg.quota)


def offloaded(
    store: Store,
    cfg: OffloadConfig,
    *,
    scorer: Scorer | None = None,
    axis: str | None = None,
) -> Stage:
    """A stage that serves the experts of a `store`: host leaves [L, E, ...], or an opened folder.

    Args:
        scorer: predicts the next layer's experts; None predicts nothing.
        axis: mesh axis that the experts are sharded over, when inside `shard_map`.

    Exact: outputs are bit-equal to the resident stage's on CPU. Elsewhere the host rounds in other
    places than the device, so what it computes agrees to 1e-5 of the largest value in float32. With
    an `importance_threshold` outputs are lossy, and depend on what the cache holds.
    Cost per call: one transfer of an expert per miss that is moved and per live prefetch lane; one
    host call unless all misses are moved; with `axis` one psum of [T, K, D]. Raises `InputError`
    where the host shall compute what is on disk, and where threshold and store do not fit.
    """
    source, policy = source_of(store, axis), POLICIES[cfg.policy]
    num_layers, num_experts = source.num_layers, source.num_experts
    _check_source(source, cfg)
    ahead = LookAhead(
        scorer=scorer, source=source, mode=cfg.fetch_mode, admission=cfg.admission, axis=axis
    )

    def stage(x, routing, weights, layer, state):
        assert weights is None, "the offloaded stage brings its own experts"
        local, landing = local_routing(routing, axis, num_experts), state.landing
        chosen = local.topk_idx.reshape(-1)[:, None] == jnp.arange(num_experts)[None]
        wanted, rows = chosen.any(0), jnp.sum(chosen, axis=0, dtype=jnp.int32)
        table, important = touch_layer(state.cache.table, layer, rows), None
        if cfg.importance_threshold is not None:
            important = important_experts(
                local.topk_idx, local.topk_weights, cfg.importance_threshold, num_experts
            )
            table = forget_low(table, layer, important)
        cache = dataclasses.replace(state.cache, table=table)
        cache, used = absorb(cache, landing, layer, wanted, wanted, policy)
        crowded = _can_crowd(cfg, num_layers, min(local.topk_idx.size, num_experts))
        landed = landed_experts(landing, layer, num_experts) & crowded
        work = sort_experts(cache.table, layer, wanted, landed, rows, important)
        work = _divided(cfg, work, rows)
        call = plan_call(x, local, work, source=source, policy=policy)
        y_host = None if cfg.serve == "fetch" else run_on_host(call)
        cache, y = run_missing(call, cache)
        if crowded or cfg.admission:
            keep = last_wave(work) if crowded else wanted
            cache, late = absorb(
                cache, landing, layer, work.late, keep, policy, admission=cfg.admission
            )
            used += late
        # Behind the demand transfers on the link, beside the last wave's compute.
        idle = work.num_moved == 0
        coming, predictor = look_ahead(
            ahead, x, routing, layer, cache.table, landing, state.predictor, idle
        )
        y = run_last(call, cache, y)
        y = unpermute(call, y if y_host is None else pick_rows(call, y, y_host))
        state = OffloadState(cache=cache, landing=coming, predictor=predictor)
        return sum_ranks(y, axis), state, _counts(work, landing, used, axis)

    return stage


def _check_source(source, cfg):
    in_host = isinstance(source, HostSource)
    check(
        cfg.serve == "fetch" or in_host,
        f"serve={cfg.serve!r}: experts on disk can only be fetched",
    )
    lossy, two = cfg.importance_threshold is not None, in_host and source.low is not None
    check(
        lossy == two,
        f"importance_threshold={cfg.importance_threshold}, but the experts are "
        f"{'in' if two else 'not in'} two precisions{'' if in_host else ': they are on disk'}",
    )


def _divided(cfg, work, rows):
    """`work` with its missing experts (int32 [E] `rows` each) divided between link and host."""
    first = jnp.minimum(work.num_cached, rows.shape[0] - 1)
    missing_rows = jnp.roll(rows[work.order], -first)
    moved = num_moved(missing_rows, work.num_missing, cfg.serve, cfg.costs)
    return dataclasses.replace(work, num_moved=moved)


def _can_crowd(cfg, num_layers, most_wanted):
    """Whether a landed expert may find no slot, and then waits for the last wave.

    Not in mode `always`: the wait costs temporaries that its TPU budgets do not hold (docs/log.md).
    Nor where the host may compute: then it serves them, and there may be no last wave to wait for.
    """
    if cfg.serve != "fetch":
        return False
    least = {"layer": cfg.num_slots // num_layers, "shared": cfg.num_slots}
    slots = least[cfg.quota] if isinstance(cfg.quota, str) else min(cfg.quota)
    return cfg.prefetch_lanes > 0 and cfg.fetch_mode == "missing" and most_wanted > slots


def _counts(work, landing, used, axis):
    """Of the call; `used` of the landed experts were wanted by it or admitted to the cache."""
    fetched = jnp.sum(landing.granule >= 0, dtype=jnp.int32)
    counts = StageCounts(
        lookups=jnp.sum(work.wanted, dtype=jnp.int32),
        hits=work.num_cached + work.num_late,
        demand_fetches=work.num_moved,
        low_fetches=jnp.int32(0) if work.num_full is None else work.num_moved - work.num_full,
        host_computes=work.num_missing - work.num_moved,
        prefetches=fetched,
        prefetches_wasted=fetched - used,
        waves=num_waves(work),
    )
    waves = most_of_ranks(counts.waves, axis)
    return dataclasses.replace(sum_ranks(counts, axis), waves=waves)
