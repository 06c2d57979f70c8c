"""What the link does when nobody waits: which absent expert deserves the place of a cached one.

HybriMoE (arXiv 2504.05897) keeps a moving average of router scores and swaps the cached expert of
the lowest for the absent one of the highest. A transfer for the cache is worth its time only if
nobody waits behind it: prefetches and admissions share a budget of the bytes that a whole step
leaves the link, and stop while wrong ones cost more than the device can hide.

Axis letters:
    L  MoE layers      E  experts
"""

import dataclasses
from typing import Any

import numpy as np

from moejax.core.errors import check
from moejax.costmodel.offload_bounds import prefetch_helps


def average_scores(scores: Any, used: Any, decay: float) -> Any:
    """S <- (1 - decay) S + decay u: moving average of what every expert was used.

    Arrays of any shape, of numpy or jax. `used` is router weight or tokens per expert; divide it
    by the tokens for a share.
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


def prefetch_gain_s(precision: np.ndarray, *, tau_s: float, window_s: float) -> np.ndarray:
    """Expected seconds that a link-bound layer gains by 0, 1, ... m prefetches, float64 [m + 1].

        gain(n) = min(w, n tau) - tau * sum over r <= n of (1 - precision[r])

    The link works through the window w in which it would idle, and what it moved in vain the
    layer's misses wait for. All n transfers are ended, whatever the router then says.

    Args:
        precision: how often the r-th best guess among experts that are not cached is wanted,
            float [m] in [0, 1].
        tau_s: seconds of one transfer. window_s: from the end of one layer's misses to the next
            layer's router.
    """
    precision = np.asarray(precision, np.float64)
    good = precision.ndim == 1 and bool(((precision >= 0) & (precision <= 1)).all())
    check(good, f"precision={precision.tolist()} is no list of shares between 0 and 1")
    check(tau_s > 0 and window_s >= 0, f"tau_s={tau_s}, window_s={window_s}")
    count = np.arange(len(precision) + 1)
    wasted = np.concatenate([[0.0], np.cumsum(1 - precision)])
    return np.minimum(window_s, count * tau_s) - tau_s * wasted


def best_lanes(precision: np.ndarray, *, tau_s: float, window_s: float) -> int:
    """The number of prefetches worth having: the most `prefetch_gain_s`, the fewest of equals.

    Up to w / tau every guess is free. The one that crosses the window's end pays when it is right
    more often than the share of it that lies outside. No later one gains anything, and 0 is always
    there to choose, so the choice does no harm.

    >>> precision = np.array([0.95, 0.9, 0.8, 0.6])
    >>> [best_lanes(precision, tau_s=1.0, window_s=w) for w in (0.0, 0.04, 0.06, 1.5, 2.1, 9.0)]
    [0, 0, 1, 2, 2, 4]
    """
    return int(np.argmax(prefetch_gain_s(precision, tau_s=tau_s, window_s=window_s)))
