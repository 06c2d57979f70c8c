"""Recordings whose routing is known, so that a predictor's right answer is too."""

import jax
import numpy as np

from moejax.predictors.features import Recording
from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams, choose, router_logits, scores

E, K, D, V, L = 16, 2, 24, 11, 4
CFG = RouterConfig(num_experts=E, top_k=K)


def routers(rng: np.random.Generator, cfg: RouterConfig = CFG, num_layers: int = L) -> RouterParams:
    """Stacked random gates."""
    w_router = rng.normal(size=(num_layers, D, cfg.num_experts)).astype(np.float32)
    bias = rng.normal(size=(num_layers, cfg.num_experts)).astype(np.float32)
    return RouterParams(w_router=w_router, correction_bias=bias if cfg.correction_bias else None)


def rotated_stream(
    rng: np.random.Generator,
    batch: int = 16,
    length: int = 32,
    *,
    cfg: RouterConfig = CFG,
    states: int = 1 << 16,
) -> tuple[Recording, RouterParams]:
    """A model whose hidden state is turned by a fixed rotation from layer to layer.

    The next gate reads the wrong coordinates and knows nothing; a linear map of the hidden state
    knows everything. Tokens sit at one of `states` random points. Returns recording and routers.
    """
    gates = routers(rng, cfg)
    turns = [np.linalg.qr(rng.normal(size=(D, D)))[0] for _ in range(L - 1)]
    points = rng.normal(size=(states, D)).astype(np.float32)
    hidden = [points[rng.integers(0, states, (batch, length))]]
    for turn in turns:
        hidden.append((hidden[-1] @ turn).astype(np.float32))
    return record(np.stack(hidden), gates, cfg, rng), gates


def record(hidden: np.ndarray, gates: RouterParams, cfg: RouterConfig, rng) -> Recording:
    """What the gates choose for hidden [L, B, S, D]."""
    num_layers, batch, length, _ = hidden.shape
    idx, weights = [], []
    for layer in range(num_layers):
        router = jax.tree.map(lambda leaf, layer=layer: leaf[layer], gates)
        score = scores(router_logits(router, hidden[layer].reshape(-1, D)), cfg)
        chosen = choose(score, router.correction_bias, cfg)
        idx.append(chosen)
        weights.append(np.take_along_axis(np.asarray(score), np.asarray(chosen), axis=-1))
    shape = (num_layers, batch, length, cfg.top_k)
    return Recording(
        tokens=rng.integers(0, V, (batch, length)).astype(np.int32),
        topk_idx=np.stack(idx).reshape(shape).astype(np.int32),
        topk_weights=np.stack(weights).reshape(shape).astype(np.float32),
        hidden=hidden,
    )


def chained_choices(rng: np.random.Generator, batch: int = 16, length: int = 32) -> Recording:
    """Layer 0 chooses at random, every later layer the images of the choices before it."""
    first = rng.permuted(np.tile(np.arange(E), (batch, length, 1)), axis=-1)[..., :K]
    idx = [first]
    for _ in range(L - 1):
        idx.append(rng.permutation(E)[idx[-1]])
    return from_choices(np.stack(idx), rng)


def from_choices(idx: np.ndarray, rng: np.random.Generator) -> Recording:
    """A recording of topk_idx [L, B, S, K] with random tokens and weights."""
    weights = rng.random(idx.shape).astype(np.float32) + 0.1
    tokens = rng.integers(0, V, idx.shape[1:3]).astype(np.int32)
    return Recording(tokens=tokens, topk_idx=idx.astype(np.int32), topk_weights=weights)


def take(recording: Recording, rows: slice) -> Recording:
    """Some sequences of a recording."""
    hidden = recording.hidden
    return Recording(
        tokens=recording.tokens[rows],
        topk_idx=recording.topk_idx[:, rows],
        topk_weights=recording.topk_weights[:, rows],
        hidden=None if hidden is None else hidden[:, rows],
    )


def shuffled_targets(recording: Recording, rng: np.random.Generator) -> Recording:
    """Each layer's choices dealt to other tokens: nothing but popularity is left to predict."""
    idx = recording.topk_idx
    dealt = [
        rng.permutation(layer.reshape(-1, idx.shape[-1])).reshape(idx[0].shape) for layer in idx
    ]
    return from_choices(np.stack(dealt), rng)
