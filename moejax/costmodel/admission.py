"""What the link does when nobody waits: which absent expert deserves the place of a cached one.

HybriMoE (arXiv 2504.05897) keeps a moving average of router scores and swaps the cached expert of
the lowest for the absent one of the highest. A transfer for the cache is worth its time only if
nobody waits behind it: prefetches and admissions share a budget of the bytes that a whole step
leaves the link, and stop while wrong ones cost more than the device can hide.

Axis letters:
    L  MoE layers      E  experts
"""

import dataclasses

import numpy as np

from moejax.core.errors import check
from moejax.costmodel.offload_bounds import prefetch_helps


def average_scores(scores: np.ndarray, used: np.ndarray, decay: float) -> np.ndarray:
    """S <- (1 - decay) S + decay u: moving average of what every expert was used, any shape.

    `used` is router weight or tokens per expert; divide it by the tokens for a share.
    """
    check(0 < decay <= 1, f"decay={decay} must be above 0 and at most 1")
    return (1 - decay) * scores + decay * used


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swap:
    """`incoming` would take the place of `outgoing` in `layer` and win `gain` of score."""

    layer: int
    incoming: int
    outgoing: int
    gain: float


def best_swap(scores: np.ndarray, resident: np.ndarray, *, margin: float = 0.0) -> Swap | None:
    """The swap of the largest gain over all layers, None when none exceeds `margin`.

    `scores` is float [L, E], `resident` bool [L, E].
    """
    check(scores.shape == resident.shape, f"scores {scores.shape}, resident {resident.shape}")
    lowest = np.where(resident, scores, np.inf)
    highest = np.where(resident, -np.inf, scores)
    gain = highest.max(1) - lowest.min(1)  # -inf for a layer with no place or no absent expert
    layer = int(np.argmax(gain))
    if not gain[layer] > margin:
        return None
    incoming, outgoing = int(np.argmax(highest[layer])), int(np.argmin(lowest[layer]))
    return Swap(layer=layer, incoming=incoming, outgoing=outgoing, gain=float(gain[layer]))


def step_budget_bytes(step_s: float, demand_bytes: float, link_bytes_per_s: float) -> float:
    """Bytes that a step of `step_s` seconds leaves the link beside what its misses move.

    >>> step_budget_bytes(0.01, 100e6, 25e9)
    150000000.0
    """
    check(step_s >= 0 and demand_bytes >= 0, f"step_s={step_s}, demand_bytes={demand_bytes}")
    return max(0.0, step_s * link_bytes_per_s - demand_bytes)


def lanes_without_harm(
    expected_hits: np.ndarray, cached: float, *, tau_s: float, window_s: float
) -> int:
    """The most predicted experts to prefetch by the do-no-harm rule, q < w / tau.

    Args:
        expected_hits: chance that the first, second, ... prediction is wanted, float [m].
        cached: share of wrong predictions that are resident anyway and move nothing.
    """
    wasted = np.cumsum(1 - np.asarray(expected_hits)) * (1 - cached)
    fine = [prefetch_helps(float(q), tau_s, window_s) for q in wasted]
    return next((i for i, good in enumerate(fine) if not good), len(fine))
