"""SRP(m): how well one choice of experts serves m tokens in a row.

"Not All Models Suit Expert Offloading" (arXiv 2505.16056) slides a window of m tokens over each
sequence. With c the uses of an expert in a window, a segment router of threshold p loads the expert
for the whole window where c >= p. Summed over windows and experts it covers M = sum of those c,
spends P = m for each, and A = sum of all c is wanted; the F1 of its choice is 2 M / (P + A).
SRP(m) is that of the best threshold, and P / A there the cache it asks for, in units of top-k.

Axis letters:
    L  MoE layers      T  tokens      E  experts      m  tokens of a window
"""

import dataclasses

import numpy as np

from moejax.core.errors import check
from moejax.data.routing_trace import RoutingTrace


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentRouting:
    """The best segment router of a model, and of every layer; nan where no window fits."""

    srp: float
    cache: float  # rho, experts that it loads over experts that tokens use
    threshold: int  # uses in a window from which on an expert is loaded
    layer_srp: np.ndarray  # float64 [L], every layer with a threshold of its own
    windows: int  # over all layers


def segment_routing(trace: RoutingTrace, window: int) -> SegmentRouting:
    """SRP of windows of `window` tokens (m). `InputError` for a window below 1.

    Windows lie within the tokens that a layer saw of one sequence; shorter sequences have none.
    Memory: one count per token and expert.
    """
    counts = count_windows(trace, window)
    srp, cache, threshold = _best(counts.sum(0), window)
    return SegmentRouting(
        srp=srp,
        cache=cache,
        threshold=threshold,
        layer_srp=np.array([_best(layer, window)[0] for layer in counts]),
        windows=int(counts.sum()) // trace.num_experts,
    )


def count_windows(trace: RoutingTrace, window: int) -> np.ndarray:
    """Pairs of an expert and a window with c uses, int64 [L, m + 1] over c."""
    check(window >= 1, f"window={window} must be at least 1 token")
    counts = np.zeros((trace.num_layers, window + 1), np.int64)
    present = np.any(trace.present, axis=-1)
    for start, length in zip(trace.sequence_starts, trace.sequence_lengths, strict=True):
        for layer in range(trace.num_layers):
            tokens = slice(start, start + length)
            chosen = trace.topk_idx[layer, tokens][present[layer, tokens]]
            if len(chosen) < window:
                continue
            used = np.zeros((len(chosen) + 1, trace.num_experts + 1), np.int32)
            np.put_along_axis(used[1:], chosen, 1, axis=1)
            total = np.cumsum(used, axis=0)[:, :-1]
            in_window = total[window:] - total[:-window]
            counts[layer] += np.bincount(in_window.ravel(), minlength=window + 1)
    return counts


def _best(counts: np.ndarray, window: int) -> tuple[float, float, int]:
    """(F1, rho, threshold) of the best threshold, from how often each c occurs."""
    uses = np.arange(window + 1)
    covered = np.cumsum((counts * uses)[::-1])[::-1]  # from each threshold on
    spent = np.cumsum(counts[::-1])[::-1] * window
    wanted = covered[0]
    if wanted == 0:
        return float("nan"), float("nan"), 0
    f1 = 2 * covered / (spent + wanted)
    best = 1 + int(np.argmax(f1[1:]))
    return float(f1[best]), float(spent[best] / wanted), best
