"""How good a prediction is for a batch: one set of experts is fetched for many sequences.

Every token votes for the k experts that it scores highest; the mean softmax orders experts with as
many votes. PreScope (arXiv 2509.23638) judges such a ranking by token volume: what matters is to
know the experts that many of the batch's tokens will ask for.

    token_coverage  fraction of the batch's (token, expert) pairs among the m experts voted hottest
    coverage_error  what is missing to the coverage of the m experts that really were the hottest
    hot_rank        fraction of the m voted hottest that really were, ties in truth counting as hot

Axis letters:
    L  target layers    B  sequences    S  positions    K  experts per token    E  experts
    G  batches, (B / batch) * S
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchFigures:
    """By m; every list has one entry per target layer."""

    token_coverage: dict[int, list[float]]
    coverage_error: dict[int, list[float]]
    hot_rank: dict[int, list[float]]


def batch_figures(
    scores: np.ndarray, chosen: np.ndarray, sizes: Sequence[int], batch: int
) -> BatchFigures:
    """Figures of scores [L, B, S, E] against the choices [L, B, S, K], `batch` sequences at a time.

    Tokens of the same position in `batch` sequences, spread over the recording, form one batch;
    B % batch sequences are left out, padding votes and asks for nothing.
    """
    votes, asked = votes_of(scores, chosen, batch)
    volume = np.stack([(asked == e).sum(-1) for e in range(votes.shape[-1])], axis=-1)
    hottest = np.argsort(-votes, axis=-1, kind="stable")
    predicted = np.take_along_axis(volume, hottest, axis=-1)  # [L, G, E], by falling votes
    actual = -np.sort(-volume, axis=-1)
    total = np.maximum(actual.sum((1, 2)), 1)
    coverage, error, hot = {}, {}, {}
    for m in sizes:
        covered, best = (part[..., :m].sum((1, 2)) for part in (predicted, actual))
        coverage[m] = (covered / total).tolist()
        error[m] = (1 - covered / np.maximum(best, 1)).tolist()
        # Experts that nobody asked for are not hot, however few were asked for.
        right = (predicted[..., :m] >= actual[..., m - 1, None]) & (predicted[..., :m] > 0)
        wanted = np.minimum((actual > 0).sum(-1), m)
        hot[m] = (right.sum((1, 2)) / np.maximum(wanted.sum(1), 1)).tolist()
    return BatchFigures(token_coverage=coverage, coverage_error=error, hot_rank=hot)


def votes_of(scores: np.ndarray, chosen: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Votes [L, G, E] of every batch, and the experts [L, G, batch * K] that it asked for."""
    targets, sequences, length, num_experts = scores.shape
    top_k, batch = chosen.shape[-1], min(batch, sequences)
    groups = sequences // batch
    scores, chosen = scores[:, : groups * batch], chosen[:, : groups * batch]
    real = (chosen < num_experts).any((0, 3))  # [B, S]
    scores = scores[:, real]
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True) * (batch + 1)
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :top_k]
    votes = np.zeros((targets, *real.shape, num_experts), np.float32)
    votes[:, real] = share + one_hot_sets(best, num_experts)
    votes *= (chosen < num_experts).any(-1, keepdims=True)
    shape = (targets, batch, groups, length, -1)
    votes = votes.reshape(shape).sum(1).reshape(targets, groups * length, num_experts)
    asked = np.moveaxis(chosen.reshape(shape), 1, 3)  # [L, groups, S, batch, K]
    return votes, asked.reshape(targets, groups * length, batch * top_k)


def one_hot_sets(topk_idx: np.ndarray, num_experts: int) -> np.ndarray:
    """float32 [..., E], 1 at the chosen experts of topk_idx [..., K]; ids of E choose nothing."""
    hot = np.zeros((*topk_idx.shape[:-1], num_experts + 1), np.float32)
    np.put_along_axis(hot, topk_idx.astype(np.int64), 1.0, axis=-1)
    return hot[..., :num_experts]
