"""Slots per layer: a cache divided over layers so that it hits most, or by predicted demand.

AdapMoE (arXiv 2408.10284) sizes each layer's cache by a knapsack over its hit curve. The curves
need not be concave, as those of real caches are not, so greedy steps would not do. ExpertFlow
(arXiv 2410.17954) gives layers slots in proportion to what a routing path predicts of them.

Axis letters:
    L  MoE layers      C  slots of one layer, 0 to the largest      N  slots of all layers
"""

import numpy as np

from moejax.core.errors import check


def solve_quotas(gains: np.ndarray, slots: int, *, least: int = 0) -> np.ndarray:
    """Slots of each layer, int64 [L], that sum to at most `slots` and gain most.

    Args:
        gains: what layer l gains with c slots, float [L, C + 1]: hits, or bytes or seconds saved.
        least: slots that every layer keeps.

    O(L C N) time, O(L N) memory. `InputError` when `slots` do not give every layer its least.
    """
    gains = np.asarray(gains, np.float64)
    layers, most = gains.shape[0], gains.shape[1] - 1
    check(0 <= least <= most, f"least={least} is not between 0 and {most} slots of a layer")
    check(
        slots >= layers * least,
        f"{slots} slots do not give {layers} layers {least} each; the minimum is {layers * least}",
    )
    slots = min(slots, layers * most)
    value = np.full(slots + 1, -np.inf)
    value[0] = 0.0
    choice = np.zeros((layers, slots + 1), np.int64)
    for layer in range(layers):
        best = np.full(slots + 1, -np.inf)
        for c in range(least, min(most, slots) + 1):
            with_c = np.full(slots + 1, -np.inf)
            with_c[c:] = value[: slots + 1 - c] + gains[layer, c]
            better = with_c > best
            best[better], choice[layer][better] = with_c[better], c
        value = best
    quotas, left = np.zeros(layers, np.int64), int(np.argmax(value))
    for layer in range(layers - 1, -1, -1):
        quotas[layer] = choice[layer, left]
        left -= quotas[layer]
    return quotas


def proportional_quotas(demand: np.ndarray, slots: int, *, least: int, most: int) -> np.ndarray:
    """Slots of each layer, int64 [L], in proportion to `demand` (float [L], not negative).

    They sum to `slots`, or to L * `most` where that is less: above the `least`, slot after slot
    goes to the layer that is furthest behind its share, the first of equals. Equal shares where
    nothing is demanded. O(L N). `InputError` when `slots` do not give every layer its `least`.

    >>> proportional_quotas(np.array([1.0, 2.0, 5.0]), 9, least=1, most=4).tolist()
    [2, 3, 4]
    """
    demand = np.asarray(demand, np.float64)
    layers = len(demand)
    check(bool((demand >= 0).all()), f"demand={demand.tolist()} has a negative layer")
    check(0 <= least <= most, f"least={least} is not between 0 and {most} slots of a layer")
    check(
        slots >= layers * least,
        f"{slots} slots do not give {layers} layers {least} each; the minimum is {layers * least}",
    )
    slots = min(slots, layers * most)
    demand = demand if demand.any() else np.ones(layers)
    behind = slots * demand / demand.sum() - least
    quotas = np.full(layers, least, np.int64)
    for _ in range(slots - layers * least):
        layer = int(np.argmax(np.where(quotas < most, behind, -np.inf)))
        quotas[layer] += 1
        behind[layer] -= 1
    return quotas


def static_hit_curve(uses: np.ndarray) -> np.ndarray:
    """Uses that the c most used experts of each layer cover, float64 [L, E + 1], from [L, E]."""
    ranked = np.sort(np.asarray(uses, np.float64), axis=1)[:, ::-1]
    return np.concatenate([np.zeros((len(ranked), 1)), np.cumsum(ranked, axis=1)], axis=1)
