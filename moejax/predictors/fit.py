"""Fitting the learned predictors to recorded routing.

Loss: binary cross entropy of every expert's score against the true set, summed over experts and
target layers (against the KL to the router's softmax it gives the same recall or slightly more,
and needs no router outputs). AdamW under a cosine that follows elapsed time, so that a slow machine
takes fewer steps but still ends annealed; tests count steps instead.

Axis letters:
    L  MoE layers    T  tokens, B * S    N  tokens in a batch    D  model dim    E  experts
"""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax.core.errors import check
from moejax.predictors import history, next_gate, residual
from moejax.predictors.config import FitConfig
from moejax.predictors.features import multi_hot, popularity, recorded_features
from moejax.predictors.recording import Recording
from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams

Tree = Any
Progress = Callable[[float, int, float], None]  # fraction of the horizon, step, loss


def fit_residual(
    recording: Recording,
    routers: RouterParams,
    router_cfg: RouterConfig,
    cfg: FitConfig,
    *,
    progress: Progress | None = None,
) -> tuple[residual.ResidualParams, list[float]]:
    """Learned look-ahead for a model with the stacked `routers` [L, ...]; also the loss curve.

    Memory: a copy of the recording's hidden states, (L - 1) * T * D words.
    """
    num_layers, _, _, d_model = recording.activations.shape
    hidden = jnp.asarray(recording.activations[:-1].reshape(num_layers - 1, -1, d_model))
    targets = jax.tree.map(lambda leaf: leaf[1:], routers)
    params = residual.init_residual(
        jax.random.key(cfg.seed),
        num_layers=num_layers,
        d_model=d_model,
        num_experts=router_cfg.num_experts,
        hidden=cfg.hidden,
    )

    def loss(params, targets, batch):
        hidden, chosen = batch
        base = jax.vmap(partial(next_gate.own_scores, cfg=router_cfg))(targets, hidden)
        return set_loss(jax.vmap(residual.one_layer)(params, hidden, base), chosen)

    data = hidden, _targets(recording)
    return minimize(
        loss, params, targets, data, _valid(recording, router_cfg.num_experts), cfg, progress
    )


def fit_history(
    recording: Recording,
    num_experts: int,
    vocab_size: int,
    cfg: FitConfig,
    *,
    progress: Progress | None = None,
) -> tuple[history.HistoryParams, list[float]]:
    """History predictor; reads tokens and choices, not hidden states. Also the loss curve."""
    start = jnp.asarray(popularity(recording.topk_idx, num_experts))
    params = history.init_history(
        jax.random.key(cfg.seed),
        start,
        vocab_size=vocab_size,
        embedding=cfg.embedding,
        hidden=cfg.hidden,
    )
    features = recorded_features(recording, start)

    def loss(net, _, batch):
        features, chosen = batch
        ask = jax.vmap(history.one_layer, in_axes=(0, None, 0))
        return set_loss(ask(net.mlp, net.embedding, features), chosen)

    data = features, _targets(recording)
    net, losses = minimize(
        loss, params.net, None, data, _valid(recording, num_experts), cfg, progress
    )
    return dataclasses.replace(params, net=net), losses


def set_loss(scores: jax.Array, topk_idx: jax.Array) -> jax.Array:
    """Cross entropy of scores [L - 1, N, E] against the sets [L - 1, N, K]; a mean over N."""
    chosen = multi_hot(topk_idx, scores.shape[-1])
    return optax.sigmoid_binary_cross_entropy(scores, chosen).sum((0, 2)).mean()


def minimize(
    loss: Callable[[Tree, Tree, Tree], jax.Array],
    params: Tree,
    fixed: Tree,
    data: Tree,
    rows: np.ndarray,
    cfg: FitConfig,
    progress: Progress | None = None,
) -> tuple[Tree, list[float]]:
    """Minimises `loss(params, fixed, batch)` from `params`, which stay valid; and the losses.

    Batches are drawn on the device: `cfg.batch` of the tokens `rows`, with replacement, the same
    for the same seed and step. Leaves of `data` are [L - 1, T, ...].
    """
    check(len(rows) > 0, "no tokens to fit a predictor on")
    optimizer = optax.chain(
        optax.scale_by_adam(b2=0.99), optax.add_decayed_weights(cfg.weight_decay)
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, fixed, data, rows, index, rate):
        key = jax.random.fold_in(jax.random.key(cfg.seed), index)
        picked = rows[jax.random.randint(key, (cfg.batch,), 0, rows.shape[0])]
        batch = jax.tree.map(lambda leaf: leaf[:, picked], data)
        value, grads = jax.value_and_grad(loss)(params, fixed, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its int32 count
            updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state, value

    params = jax.tree.map(jnp.copy, params)
    state, rows_on_device = optimizer.init(params), jnp.asarray(rows, jnp.int32)
    arguments = params, state, fixed, data, rows_on_device, np.int32(0), np.float32(0)
    compiled = step.lower(*arguments).compile()
    losses, count, fraction = [], 0, 0.0
    start = time.perf_counter()
    while fraction < 1:
        rate = np.float32(cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * fraction)))
        params, state, value = compiled(
            params, state, fixed, data, rows_on_device, np.int32(count), rate
        )
        losses.append(value)
        # Waiting for the step before this one keeps the clock honest and the device busy.
        previous = float(losses[max(count - 1, 0)])
        count += 1
        elapsed = (time.perf_counter() - start) / cfg.horizon_secs
        fraction = count / cfg.horizon_steps if cfg.horizon_steps else elapsed
        if progress is not None:
            progress(min(fraction, 1.0), count, previous)
    return params, [float(value) for value in losses]


def _targets(recording: Recording) -> jax.Array:
    """int32 [L - 1, T, K]: what is to be predicted."""
    topk_idx = recording.topk_idx[1:]
    return jnp.asarray(topk_idx.reshape(topk_idx.shape[0], -1, topk_idx.shape[-1]))


def _valid(recording: Recording, num_experts: int) -> np.ndarray:
    """Indices into T of the tokens that are not padding."""
    return np.flatnonzero(recording.topk_idx[0, :, :, 0].ravel() < num_experts)
