"""Gates in plain numpy, one token at a time: the oracle of the routing tests."""

import numpy as np

from moejax.routing.config import RouterConfig


def plain_scores(logits: np.ndarray, cfg: RouterConfig) -> np.ndarray:
    """Scores of one token, logits [E]."""
    if cfg.score == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def allowed_experts(biased: np.ndarray, cfg: RouterConfig) -> list[int]:
    """Experts of the best groups of one token."""
    size = cfg.num_experts // cfg.num_groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(cfg.num_groups)]
    best = {"max": 1, "top2_sum": 2}[cfg.group_score]
    totals = [sum(sorted(biased[group], reverse=True)[:best]) for group in members]
    order = sorted(range(cfg.num_groups), key=lambda g: (-totals[g], g))
    return [expert for g in order[: cfg.top_groups] for expert in members[g]]


def balanced_experts(biased: np.ndarray, cfg: RouterConfig) -> list[int]:
    """The top_k / num_groups best experts of every group of one token."""
    size, each = cfg.num_experts // cfg.num_groups, cfg.top_k // cfg.num_groups
    chosen = []
    for first in range(0, cfg.num_experts, size):
        chosen += sorted(range(first, first + size), key=lambda e: (-biased[e], e))[:each]
    return chosen


def plain_cosines(x: np.ndarray, w_project: np.ndarray, w_router: np.ndarray) -> np.ndarray:
    """Cosines [T, E] between projected tokens x [T, D] and experts."""
    x = x @ w_project
    return np.array(
        [[t @ e / (np.linalg.norm(t) * np.linalg.norm(e)) for e in w_router.T] for t in x]
    )


def plain_route(
    logits: np.ndarray, bias: np.ndarray | None, cfg: RouterConfig
) -> tuple[np.ndarray, np.ndarray]:
    """topk_idx [T, K] and topk_weights [T, K] of logits [T, E]."""
    ids, weights = [], []
    for token in logits.astype(np.float64):
        score = plain_scores(token, cfg)
        biased = score if bias is None else score + bias
        if cfg.group_choice == "balanced":
            chosen = balanced_experts(biased, cfg)
        else:
            ranked = sorted(allowed_experts(biased, cfg), key=lambda e: (-biased[e], e))
            chosen = ranked[: cfg.top_k]
        weight = np.array([score[e] for e in chosen])
        if cfg.renormalize:
            weight = weight / weight.sum()
        ids.append(chosen)
        weights.append(weight * cfg.scaling_factor)
    return np.array(ids), np.array(weights)
