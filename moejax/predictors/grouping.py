"""Which sequences to decode side by side: those that are going to want the same experts.

ExpertFlow (arXiv 2410.17954), token scheduler: the sequences of two batches are dealt into two
groups of equal size by their routing paths, so that each group wants fewer distinct experts than a
batch of strangers would. Similarity of two paths is 1 - Hamming distance / (L * E); the groups are
balanced 2-medoids. For two groups of equal size the best assignment to given medoids is a sort, so
neither step can lose and the loop ends by itself. numpy.

Axis letters:
    L  MoE layers    N  sequences    K  experts per token    E  experts
"""

import numpy as np

from moejax.core.errors import check
from moejax.predictors.coverage import one_hot_sets

MAX_ITERATIONS = 30


def similarity(topk_idx: np.ndarray, num_experts: int) -> np.ndarray:
    """float64 [N, N], 1 for equal paths, from the paths topk_idx [L, N, K] of N tokens."""
    layers, tokens, _ = topk_idx.shape
    paths = one_hot_sets(topk_idx, num_experts).swapaxes(0, 1).reshape(tokens, -1)
    size = paths.sum(1)
    hamming = size[:, None] + size[None] - 2 * paths @ paths.T
    return 1 - hamming.astype(np.float64) / (layers * num_experts)


def two_groups(alike: np.ndarray) -> np.ndarray:
    """int [N]: the sequences of one group, then those of the other, from their similarity [N, N].

    N is even. Starts at the two least alike. Cost: at most 30 sorts of N and sums over N * N.
    """
    count = len(alike)
    check(count > 0 and count % 2 == 0, f"{count} sequences are not two groups of equal size")
    medoids = np.unravel_index(alike.argmin(), alike.shape)
    order = np.arange(count)
    for _ in range(MAX_ITERATIONS):
        order = np.argsort(alike[medoids[1]] - alike[medoids[0]], kind="stable")
        halves = np.sort(order.reshape(2, -1), axis=1)
        order = halves.ravel()
        inside = [alike[np.ix_(half, half)].sum(1) for half in halves]
        moved = tuple(int(half[s.argmax()]) for half, s in zip(halves, inside, strict=True))
        if moved == tuple(medoids):
            break
        medoids = moved
    return order


def distinct_experts(topk_idx: np.ndarray, order: np.ndarray, num_experts: int) -> float:
    """Distinct experts that a layer wants of one group, a mean over layers and both groups.

    topk_idx is [L, N, K]; `order` as `two_groups` gives it. Ids of E choose nothing.
    """
    wanted = one_hot_sets(topk_idx, num_experts)[:, order]
    layers, count, _ = wanted.shape
    return float(wanted.reshape(layers, 2, count // 2, -1).any(2).sum(-1).mean())
