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
from moejax.predictors.features import multi_hot, popularity, recorded_features, valid_tokens
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
        loss,
        params,
        targets,
        data,
        valid_tokens(recording.topk_idx, router_cfg.num_experts),
        cfg,
        progress,
    )


def fit_history(
    recording: Recording,
    num_experts: int,
    vocab_size: int,
    cfg: FitConfig,
    *,
    horizons: int = 1,
    stop: int | None = None,
    progress: Progress | None = None,
    watch: Callable[[int, history.HistoryParams], None] | None = None,
) -> tuple[history.HistoryParams, list[float]]:
    """History predictor for horizons 1 .. `horizons`, fitted together; also the loss curve.

    Reads choices and, unless `vocab_size` is 1, tokens; not hidden states. Choices and averages
    are dropped at random (`cfg.drop_choices`), so that no layer is relied on alone. `stop` and
    `watch`: see `minimize`.
    """
    start = jnp.asarray(popularity(recording.topk_idx, num_experts))
    params = history.init_history(
        jax.random.key(cfg.seed),
        start,
        vocab_size=vocab_size,
        embedding=cfg.embedding,
        hidden=cfg.hidden,
        horizons=horizons,
    )
    rows = valid_tokens(recording.topk_idx, num_experts)
    features = recorded_features(recording, start, vocab_size=vocab_size, rows=rows)

    def loss(net, _, batch, key):
        hots = multi_hot(batch.chosen, num_experts)
        k_choices, k_past, k_hidden = jax.random.split(key, 3)
        kept = _keep(k_hidden, (*hots.shape[:2], cfg.hidden), cfg.drop_hidden)
        seen = hots * _keep(k_choices, hots.shape, cfg.drop_choices)
        past = batch.ema * _keep(k_past, batch.ema.shape, cfg.drop_choices)
        read = history.latents(net, batch.token[0], seen, past, kept)
        parts = [
            set_loss(history.targets(net, read, batch.ema, h), batch.chosen[h:])
            for h in range(1, horizons + 1)
        ]
        return jnp.stack(parts).sum()

    def whole(net: history.HistoryNet) -> history.HistoryParams:
        return dataclasses.replace(params, net=net)

    net, losses = minimize(
        loss,
        params.net,
        None,
        features,
        np.arange(len(rows)),
        cfg,
        progress,
        noisy=True,
        stop=stop,
        watch=watch and (lambda step, net: watch(step, whole(net))),
    )
    return whole(net), losses


def set_loss(scores: jax.Array, topk_idx: jax.Array) -> jax.Array:
    """Cross entropy of scores [L', N, E] against the sets [L', N, K]; a mean over N.

    A token that a layer never saw costs nothing there.
    """
    num_experts = scores.shape[-1]
    loss = optax.sigmoid_binary_cross_entropy(scores, multi_hot(topk_idx, num_experts)).sum(-1)
    return jnp.where(topk_idx[..., 0] < num_experts, loss, 0.0).sum(0).mean()


def _keep(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """float32, 0 with probability `rate` (to 1 / 256) and else what keeps the mean at 1."""
    drawn = jax.random.bits(key, shape, jnp.uint8).astype(jnp.float32)
    return (drawn >= round(256 * rate)).astype(jnp.float32) / (1 - rate)


def minimize(
    loss: Callable[..., jax.Array],
    params: Tree,
    fixed: Tree,
    data: Tree,
    rows: np.ndarray,
    cfg: FitConfig,
    progress: Progress | None = None,
    *,
    noisy: bool = False,
    stop: int | None = None,
    watch: Callable[[int, Tree], None] | None = None,
) -> tuple[Tree, list[float]]:
    """Minimises `loss(params, fixed, batch)` from `params`, which stay valid; and the losses.

    Batches are drawn on the device: `cfg.batch` of the tokens `rows`, with replacement, the same
    for the same seed and step. Leaves of `data` are [layers, T, ...].

    Args:
        noisy: the loss takes a key too, `loss(params, fixed, batch, key)`, another every step.
        stop: ends after so many steps of the horizon, for one that was chosen beforehand.
        watch: called with the number of steps done and parameters that it must not keep.
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
        noise = (jax.random.fold_in(key, 1),) if noisy else ()
        value, grads = jax.value_and_grad(loss)(params, fixed, batch, *noise)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its int32 count
            updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state, value

    params = jax.tree.map(jnp.copy, params)
    state, rows_on_device = optimizer.init(params), jnp.asarray(rows, jnp.int32)
    arguments = params, state, fixed, data, rows_on_device, np.int32(0), np.float32(0)
    compiled = step.lower(*arguments).compile()
    losses, count, fraction = [], 0, 0.0
    start = time.perf_counter()
    while fraction < 1 and count != stop:
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
        if watch is not None:
            watch(count, params)
        if progress is not None:
            progress(min(fraction, 1.0), count, previous)
    return params, [float(value) for value in losses]


def _targets(recording: Recording) -> jax.Array:
    """int32 [L - 1, T, K]: what is to be predicted."""
    topk_idx = recording.topk_idx[1:]
    return jnp.asarray(topk_idx.reshape(topk_idx.shape[0], -1, topk_idx.shape[-1]))
