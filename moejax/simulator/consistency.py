"""Local routing consistency of a model, from the routing it recorded.

The measures of "Not All Models Suit Expert Offloading" (arXiv 2505.16056): SRP(m), see `segments`,
and SCH(m, rho), the hit rate of a cache that sees m tokens ahead; beside them what LRU, LFU and
Belady reach. Every layer of every sequence has an empty cache of its own with rho * top-k entries;
each chosen expert of a token is a lookup, and the first use of an expert is a miss.

Axis letters:
    B  caches, layers of sequences      T  tokens of the longest sequence
    K  experts per token      E  experts
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moejax.core.errors import check
from moejax.data.routing_trace import RoutingTrace
from moejax.simulator import ranks
from moejax.simulator.segments import SegmentRouting, segment_routing
from moejax.simulator.stack import caches_of_trace, hits_by_size, too_short


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency:
    """Hit rates are in [0, 1], float64 [E + 1] over the entries of a layer's cache."""

    segments: dict[int, SegmentRouting]  # by m
    sch: dict[int, np.ndarray]  # by m
    lru: np.ndarray
    lfu: np.ndarray
    belady: np.ndarray
    excluded: dict[int, int]  # by m, sequences shorter than m


def measure_consistency(trace: RoutingTrace, windows: Sequence[int]) -> Consistency:
    """All measures for every m in `windows`; sequences shorter than m are left out and counted.

    LRU, LFU and Belady take all sequences. `InputError` when no sequence is long enough.
    """
    excluded = {m: too_short(trace, m) for m in windows}
    sequences = len(trace.sequence_lengths)
    for m, count in excluded.items():
        check(count < sequences, f"window={m}: all {sequences} sequences are shorter")
    everything = caches_of_trace(trace)
    e = trace.num_experts
    long_enough = {m: caches_of_trace(trace, m) for m in windows}
    return Consistency(
        segments={m: segment_routing(trace, m) for m in windows},
        sch={m: hit_rates(c, e, ranks.sch(c, e, m)) for m, c in long_enough.items()},
        lru=hit_rates(everything, e, ranks.lru(everything, e)),
        lfu=hit_rates(everything, e, ranks.lfu(everything, e)),
        belady=hit_rates(everything, e, ranks.belady(everything, e)),
        excluded=excluded,
    )


def hit_rates(chosen: np.ndarray, num_experts: int, rank) -> np.ndarray:
    """Hit rate by cache size, float64 [E + 1], over all lookups of `chosen` [B, T, K]."""
    return hits_by_size(chosen, num_experts, rank) / np.sum(chosen < num_experts)


def entries(rho: float, top_k: int, num_experts: int) -> int:
    """Entries of a cache of `rho` times the experts of a token. `InputError` when they are none.

    Fractions of an entry are not kept, and a cache of all experts has no more than E.
    """
    count = int(rho * top_k + 1e-9)
    check(rho > 0 and count >= 1, f"rho={rho:g} of top_k={top_k} experts is no entry")
    return min(count, num_experts)
