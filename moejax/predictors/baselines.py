"""Predictors without learning, in numpy: what a learned one has to beat.

Each returns float32 scores [L - 1, B, S, E] for target layers 1 .. L - 1, counted on `fit` and
asked on `held_out`. Where a rule is silent or tied, the more popular expert goes first.

Axis letters:
    L  MoE layers    B  sequences    S  positions    K  experts per token    E  experts
"""

import jax
import numpy as np

from moejax.predictors import next_gate
from moejax.predictors.features import Recording, popularity
from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams


def one_hot_sets(topk_idx: np.ndarray, num_experts: int) -> np.ndarray:
    """float32 [..., E], 1 at the chosen experts of topk_idx [..., K]; ids of E choose nothing."""
    hot = np.zeros((*topk_idx.shape[:-1], num_experts + 1), np.float32)
    np.put_along_axis(hot, topk_idx.astype(np.int64), 1.0, axis=-1)
    return hot[..., :num_experts]


def popular_scores(fit: Recording, held_out: Recording, num_experts: int) -> np.ndarray:
    """The same order for every token: how many fit tokens chose the expert."""
    share = popularity(fit.topk_idx, num_experts)[1:, None, None]
    return np.broadcast_to(share, (*held_out.topk_idx[1:].shape[:-1], num_experts))


def previous_token_scores(fit: Recording, held_out: Recording, num_experts: int) -> np.ndarray:
    """What the sequence's previous token chose in the target layer."""
    scores = popular_scores(fit, held_out, num_experts).copy()
    scores[:, :, 1:] += one_hot_sets(held_out.topk_idx[1:, :, :-1], num_experts)
    return scores


def bigram_scores(fit: Recording, held_out: Recording, num_experts: int) -> np.ndarray:
    """Naive Bayes from the token's choices one layer earlier: log P(e) + sum_a log P(a | e).

    Pair counts start at 0.5.
    """
    scores = np.empty((*held_out.topk_idx[1:].shape[:-1], num_experts), np.float32)
    for layer, out in enumerate(scores):
        before = one_hot_sets(fit.topk_idx[layer], num_experts).reshape(-1, num_experts)
        after = one_hot_sets(fit.topk_idx[layer + 1], num_experts).reshape(-1, num_experts)
        chosen = after.sum(0) + 1
        given = (after.T @ before + 0.5) / (chosen[:, None] + 1)  # [E after, E before]
        asked = one_hot_sets(held_out.topk_idx[layer], num_experts)
        out[:] = np.log(chosen / chosen.sum()) + asked @ np.log(given).T
    return scores


def token_table_scores(fit: Recording, held_out: Recording, num_experts: int) -> np.ndarray:
    """How often the fit tokens of the same id chose the expert; popularity weighs 5 tokens."""
    tokens, top_k = fit.tokens, fit.topk_idx.shape[-1]
    size = int(max(tokens.max(), held_out.tokens.max())) + 1
    share = popularity(fit.topk_idx, num_experts)
    scores = np.empty((*held_out.topk_idx[1:].shape[:-1], num_experts), np.float32)
    for layer, out in enumerate(scores, start=1):
        pairs = tokens[..., None] * (num_experts + 1) + fit.topk_idx[layer]
        counts = np.bincount(pairs.ravel(), minlength=size * (num_experts + 1))
        counts = counts.reshape(size, num_experts + 1)[:, :num_experts]
        seen = counts.sum(1, keepdims=True) / top_k
        out[:] = ((counts + 5 * share[layer]) / (seen + 5))[held_out.tokens]
    return scores


def next_gate_scores(held_out: Recording, routers: RouterParams, cfg: RouterConfig) -> np.ndarray:
    """The next layer's router on this layer's gate input (`moejax.predictors.next_gate`)."""
    num_layers, batch, length, d = held_out.activations.shape
    ask = jax.jit(next_gate.scores, static_argnames="cfg")
    rows = [
        np.asarray(ask(routers, layer, hidden.reshape(-1, d), cfg=cfg))
        for layer, hidden in enumerate(held_out.activations[:-1])
    ]
    return np.stack(rows).reshape(num_layers - 1, batch, length, -1)
