"""Fitting the predictors that read hidden states or tokens: LLaPor, pre-attention, routing path.

LLaPor's edge layers are fitted by a focal loss (arXiv 1708.02002) and a load term; the paper gives
neither its exponent nor the form of its "expert balancing". Here the load term is the chi-square
distance of a batch's predicted load of every expert to the true one, which ranks hot experts well.
Middle layers have cross entropy alone. Pre-attention has a ranking loss: every chosen expert above
every other one, by a logistic margin.

Axis letters:
    L  MoE layers    T  tokens, B * S    N  tokens in a batch    D  model dim    E  experts
    K  experts per token    W  tokens of context
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax.core.errors import check
from moejax.predictors import llapor, path, pre_attention
from moejax.predictors.config import FitConfig
from moejax.predictors.features import multi_hot
from moejax.predictors.fit import Progress, minimize, set_loss
from moejax.predictors.llapor import LlaporConfig, LlaporParams, layer_groups
from moejax.predictors.path import PathParams, recorded_windows
from moejax.predictors.pca import compress, fit_compression
from moejax.predictors.pre_attention import PreAttentionParams
from moejax.predictors.recording import Recording


def fit_llapor(
    recording: Recording,
    num_experts: int,
    sizes: LlaporConfig,
    cfg: FitConfig,
    *,
    w_router: jax.Array | None = None,
    progress: Progress | None = None,
) -> tuple[LlaporParams, list[float]]:
    """LLaPor for target layers 1 .. L - 1; also the loss curve. `cfg.hidden` is not used.

    With `w_router` [L, D, E], that of the model, fitting starts from next-gate's logits.
    Memory: the recording's hidden states compressed, T * P words per layer.
    """
    num_layers, *_, d_model = recording.activations.shape
    rows = valid_tokens(recording, num_experts)
    groups = layer_groups(num_layers)
    edges, middles = [*groups["input"], *groups["output"]], [*groups["middle"]]
    flat = recording.activations.reshape(num_layers, -1, d_model)
    edge, _ = fit_compression(flat[edges][:, rows], sizes.edge_components)
    middle, _ = fit_compression(flat[middles][:, rows], sizes.middle_components)
    params = llapor.init_llapor(
        jax.random.key(cfg.seed), edge, middle, sizes, num_experts=num_experts
    )
    if w_router is not None:
        params = llapor.start_from_routers(params, w_router)
        sample = jnp.asarray(flat[:-1][:, rows[:: max(1, len(rows) // 1024)]])
        params = llapor.centre(params, sample, recording.topk_idx.shape[-1])
    chosen = _choices(recording)[1:]
    shrink = jax.jit(jax.vmap(compress))
    data = (
        (shrink(edge, flat[edges]), chosen[np.array(edges)]),
        (shrink(middle, flat[middles]), chosen[np.array(middles)]),
    )

    def loss(nets, _, batch):
        (edge_a, edge_idx), (middle_a, middle_idx) = batch
        shallow = jax.vmap(llapor.shallow_scores)(nets[0], edge_a)
        deep = jax.vmap(llapor.gated_scores)(nets[1], middle_a)
        return edge_loss(shallow, edge_idx, sizes) + set_loss(deep, middle_idx)

    nets, losses = minimize(loss, (params.edge, params.middle), None, data, rows, cfg, progress)
    return dataclasses.replace(params, edge=nets[0], middle=nets[1]), losses


def edge_loss(scores: jax.Array, topk_idx: jax.Array, sizes: LlaporConfig) -> jax.Array:
    """Focal loss and load term of scores [L', N, E] against sets [L', N, K]."""
    chosen = multi_hot(topk_idx, scores.shape[-1])
    focal = optax.losses.sigmoid_focal_loss(scores, chosen, gamma=sizes.focal)
    load, true_load = jax.nn.sigmoid(scores).mean(1), chosen.mean(1)
    floor = 1 / scores.shape[1]
    distance = jnp.square(load - true_load) / jnp.maximum(true_load, floor)
    return focal.sum((0, 2)).mean() + sizes.balance * distance.sum()


def fit_pre_attention(
    states: np.ndarray,
    recording: Recording,
    num_experts: int,
    cfg: FitConfig,
    *,
    progress: Progress | None = None,
) -> tuple[PreAttentionParams, list[float]]:
    """For all layers from their normalised inputs `states` [L, B, S, D]; also the loss curve."""
    num_layers, *_, d_model = states.shape
    check(
        states.shape[:-1] == recording.topk_idx.shape[:-1],
        f"states are {states.shape}, topk_idx is {recording.topk_idx.shape}",
    )
    params = pre_attention.init_pre_attention(
        jax.random.key(cfg.seed),
        num_layers=num_layers,
        d_model=d_model,
        hidden=cfg.hidden,
        num_experts=num_experts,
    )

    def loss(params, _, batch):
        states, chosen = batch
        return ranking_loss(jax.vmap(pre_attention.one_layer)(params, states), chosen)

    data = jnp.asarray(states.reshape(num_layers, -1, d_model)), _choices(recording)
    return minimize(loss, params, None, data, valid_tokens(recording, num_experts), cfg, progress)


def ranking_loss(scores: jax.Array, topk_idx: jax.Array) -> jax.Array:
    """Mean over pairs of log(1 + exp(other - chosen)), summed over layers; a mean over N."""
    num_experts, top_k = scores.shape[-1], topk_idx.shape[-1]
    other = 1 - multi_hot(topk_idx, num_experts)
    best = jnp.take_along_axis(scores, jnp.minimum(topk_idx, num_experts - 1), axis=-1)
    margin = jax.nn.softplus(scores[..., None, :] - best[..., None])  # [L, N, K, E]
    pairs = top_k * (num_experts - top_k)
    return (margin * other[..., None, :]).sum((0, 2, 3)).mean() / max(pairs, 1)


def fit_path(
    recording: Recording,
    num_experts: int,
    vocab_size: int,
    cfg: FitConfig,
    *,
    context: int = 16,
    progress: Progress | None = None,
) -> tuple[PathParams, list[float]]:
    """For all layers 0 .. L - 1 from `context` tokens; also the loss curve."""
    params = path.init_path(
        jax.random.key(cfg.seed),
        num_layers=len(recording.topk_idx),
        num_experts=num_experts,
        vocab_size=vocab_size,
        embedding=cfg.embedding,
        hidden=cfg.hidden,
        context=context,
    )
    windows = recorded_windows(recording.token_ids, context).reshape(1, -1, context)

    def loss(params, _, batch):
        windows, chosen = batch
        return set_loss(path.scores(params, windows[0]), chosen)

    data = jnp.asarray(windows), _choices(recording)
    return minimize(loss, params, None, data, valid_tokens(recording, num_experts), cfg, progress)


def valid_tokens(recording: Recording, num_experts: int) -> np.ndarray:
    """Indices into T of the tokens that are not padding."""
    return np.flatnonzero(recording.topk_idx[0, :, :, 0].ravel() < num_experts)


def _choices(recording: Recording) -> jax.Array:
    """int32 [L, T, K]."""
    layers, *_, top_k = recording.topk_idx.shape
    return jnp.asarray(recording.topk_idx.reshape(layers, -1, top_k))
