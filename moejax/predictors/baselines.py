"""Predictors without learning, in numpy: what a learned one has to beat.

Each returns float32 scores [L - h, B, S, E] for target layers h .. L - 1, counted on `fit` and
asked on `held_out`; h is the horizon, target l + h being predicted while layer l runs. Where a rule
is silent or tied, the more popular expert goes first.

Axis letters:
    L  MoE layers    B  sequences    S  positions    K  experts per token    E  experts
"""

import jax
import numpy as np

from moejax.predictors import next_gate
from moejax.predictors.coverage import one_hot_sets
from moejax.predictors.features import popularity
from moejax.predictors.mlp import select
from moejax.predictors.recording import Recording
from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams


def popular_scores(
    fit: Recording, held_out: Recording, num_experts: int, *, horizon: int = 1
) -> np.ndarray:
    """The same order for every token: how many fit tokens chose the expert."""
    share = popularity(fit.topk_idx, num_experts)[horizon:, None, None]
    return np.broadcast_to(share, (*held_out.topk_idx[horizon:].shape[:-1], num_experts))


def previous_token_scores(
    fit: Recording, held_out: Recording, num_experts: int, *, horizon: int = 1
) -> np.ndarray:
    """What the sequence's previous token chose in the target layer."""
    scores = popular_scores(fit, held_out, num_experts, horizon=horizon).copy()
    scores[:, :, 1:] += one_hot_sets(held_out.topk_idx[horizon:, :, :-1], num_experts)
    return scores


def bigram_scores(
    fit: Recording, held_out: Recording, num_experts: int, *, horizon: int = 1
) -> np.ndarray:
    """Naive Bayes from the token's choices `horizon` layers earlier: log P(e) + sum_a log P(a | e).

    Pair counts start at 0.5.
    """
    scores = np.empty((*held_out.topk_idx[horizon:].shape[:-1], num_experts), np.float32)
    for layer, out in enumerate(scores):
        before = one_hot_sets(fit.topk_idx[layer], num_experts).reshape(-1, num_experts)
        after = one_hot_sets(fit.topk_idx[layer + horizon], num_experts).reshape(-1, num_experts)
        chosen = after.sum(0) + 1
        given = (after.T @ before + 0.5) / (chosen[:, None] + 1)  # [E after, E before]
        asked = one_hot_sets(held_out.topk_idx[layer], num_experts)
        out[:] = np.log(chosen / chosen.sum()) + asked @ np.log(given).T
    return scores


def token_table_scores(
    fit: Recording, held_out: Recording, num_experts: int, *, horizon: int = 1
) -> np.ndarray:
    """How often the fit tokens of the same id chose the expert; popularity weighs 5 tokens."""
    tokens, asked, top_k = fit.token_ids, held_out.token_ids, fit.topk_idx.shape[-1]
    size = int(max(tokens.max(), asked.max())) + 1
    share = popularity(fit.topk_idx, num_experts)
    scores = np.empty((*held_out.topk_idx[horizon:].shape[:-1], num_experts), np.float32)
    for layer, out in enumerate(scores, start=horizon):
        pairs = tokens[..., None] * (num_experts + 1) + fit.topk_idx[layer]
        counts = np.bincount(pairs.ravel(), minlength=size * (num_experts + 1))
        counts = counts.reshape(size, num_experts + 1)[:, :num_experts]
        seen = counts.sum(1, keepdims=True) / top_k
        out[:] = ((counts + 5 * share[layer]) / (seen + 5))[asked]
    return scores


def next_gate_scores(
    held_out: Recording, routers: RouterParams, cfg: RouterConfig, *, horizon: int = 1
) -> np.ndarray:
    """The target layer's router on this layer's gate input (`moejax.predictors.next_gate`)."""
    _, batch, length, d = held_out.activations.shape
    ask = jax.jit(next_gate.own_scores, static_argnames="cfg")
    rows = [
        np.asarray(ask(select(routers, layer + horizon), hidden.reshape(-1, d), cfg=cfg))
        for layer, hidden in enumerate(held_out.activations[:-horizon])
    ]
    return np.stack(rows).reshape(len(rows), batch, length, -1)
