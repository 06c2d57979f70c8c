"""Hit rates and bytes of a replay.

Hit rate = hits / lookups, where every distinct expert of a call is one lookup. Compulsory misses
count: the first use of an expert is a miss under every policy.

Axis letters:
    C  calls      L  MoE layers
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moejax.core.errors import check
from moejax.data.routing_trace import RoutingTrace
from moejax.simulator.calls import Calls, calls_of_trace
from moejax.simulator.replay import Outcome, replay_slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Totals over some calls."""

    lookups: int
    hits: int
    bytes_loaded: int
    evictions: int
    calls_over_budget: int  # calls that needed more than the budget by themselves
    peak_bytes: int  # most resident after any of the calls

    @property
    def hit_rate(self) -> float:
        """In [0, 1]; nan without lookups."""
        return self.hits / self.lookups if self.lookups else float("nan")


def summarize(calls: Calls, outcome: Outcome, *, decode_only: bool = False) -> Summary:
    """Totals over all calls, or over those of decode steps (after a prefill that warmed up)."""
    where = calls.is_decode if decode_only else np.ones_like(calls.is_decode)
    misses = outcome.misses[where].astype(np.int64)
    lookups = int(calls.lookups[where].sum())
    return Summary(
        lookups=lookups,
        hits=lookups - int(misses.sum()),
        bytes_loaded=int((misses * calls.expert_bytes[calls.layer[where]]).sum()),
        evictions=int(outcome.evictions[where].sum()),
        calls_over_budget=int(outcome.over_budget[where].sum()),
        peak_bytes=int(outcome.resident_bytes[where].max(initial=0)),
    )


def layer_hit_rate(calls: Calls, outcome: Outcome, *, decode_only: bool = False) -> np.ndarray:
    """Hit rate of every layer, float64 [L]; nan for a layer without lookups."""
    where = calls.is_decode if decode_only else np.ones_like(calls.is_decode)
    layers = len(calls.expert_bytes)
    lookups = np.bincount(calls.layer[where], calls.lookups[where], layers)
    misses = np.bincount(calls.layer[where], outcome.misses[where], layers)
    return np.divide(lookups - misses, lookups, out=np.full(layers, np.nan), where=lookups > 0)


def hit_rate_by_slots(
    trace: RoutingTrace,
    slots: Sequence[int],
    policies: Sequence[str] = ("lru", "lfu", "belady"),
) -> dict[str, list[float]]:
    """Decode hit rate in [0, 1] of a cache with `slots` slots in every layer, per policy.

    Counts time as the compiled offloaded step does. Raises `InputError` for fewer slots than one
    token needs.
    """
    calls = calls_of_trace(trace)
    check(bool(calls.is_decode.any()), "the trace has no decode step to rate")
    return {
        policy: [
            summarize(calls, replay_slots(calls, policy, count), decode_only=True).hit_rate
            for count in slots
        ]
        for policy in policies
    }
