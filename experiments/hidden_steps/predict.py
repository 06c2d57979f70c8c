"""Every predictor fitted to the same recording; those of a kind get as many bytes as LLaPor.

Axis letters:
    L  MoE layers    N  windows    S  tokens of a window    T  N * S    D  model dim    E  experts
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from configs.hidden_predictors import HiddenConfig
from experiments.hidden_steps.states import Recorded
from moejax.core.errors import check
from moejax.core.memory import nbytes
from moejax.models.config import DecoderConfig
from moejax.predictors import baselines, fit, fit_hidden, history, llapor, path, pre_attention
from moejax.predictors.config import FitConfig
from moejax.predictors.features import recorded_features
from moejax.predictors.fit import Progress
from moejax.predictors.mlp import select
from moejax.predictors.pre_attention import init_pre_attention
from moejax.predictors.recording import Recording
from moejax.predictors.residual import init_residual, one_layer
from moejax.routing.gates import RouterParams

# How many layers ahead: 0 predicts a layer from its own input, the path all layers from the tokens.
HORIZONS = {
    "llapor": 1,
    "residual": 1,
    "history": 1,
    "next_gate": 1,
    "token_table": 1,
    "bigram": 1,
    "previous_token": 1,
    "popularity": 1,
    "path": 0,
    "pre_attention": 0,
}


def same_bytes(target: int, make: Callable[[int], Any], most: int = 4096) -> int:
    """The largest width for which `make(width)` has at most `target` bytes; nothing is computed.

    Raises `InputError` where even a width of 1 has more.
    """

    def size(width: int) -> int:
        return nbytes(jax.eval_shape(lambda: make(width)))

    check(size(1) <= target, f"a predictor of {target} bytes: the smallest has {size(1)}")
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= target else (low, middle - 1)
    return low


def fit_all(
    train: Recorded,
    routers: RouterParams,
    model: DecoderConfig,
    cfg: HiddenConfig,
    show: Callable[[str], AbstractContextManager[Progress]],
) -> dict[str, Any]:
    """Fitted predictors by name, LLaPor's bytes for all but the path; `show(name)` shows a fit."""
    routing, router, key = train.routing, model.moe.router, jax.random.key(0)
    experts, vocab = router.num_experts, model.vocab_size
    sizes = dict(num_layers=model.num_moe_layers, d_model=model.d_model, num_experts=experts)
    fitted: dict[str, Any] = {}
    with show("llapor") as update:
        fitted["llapor"], _ = fit_hidden.fit_llapor(
            routing, experts, cfg.llapor, cfg.fit, w_router=routers.w_router, progress=update
        )
    target = nbytes(fitted["llapor"])
    width = same_bytes(target, lambda hidden: init_residual(key, hidden=hidden, **sizes))
    wide = dataclasses.replace(cfg.others, hidden=width)
    with show("residual") as update:
        fitted["residual"], _ = fit.fit_residual(routing, routers, router, wide, progress=update)
    width = same_bytes(target, lambda latent: _history(routing, vocab, experts, latent, cfg.others))
    wide = dataclasses.replace(cfg.others, embedding=width)
    with show("history") as update:
        fitted["history"], _ = fit.fit_history(routing, experts, vocab, wide, progress=update)
    width = same_bytes(target, lambda hidden: init_pre_attention(key, hidden=hidden, **sizes))
    wide = dataclasses.replace(cfg.fit, hidden=width)
    with show("pre_attention") as update:
        fitted["pre_attention"], _ = fit_hidden.fit_pre_attention(
            train.entering, routing, experts, wide, progress=update
        )
    wide = dataclasses.replace(cfg.fit, embedding=cfg.path_embedding)
    with show("path") as update:
        fitted["path"], _ = fit_hidden.fit_path(
            routing, experts, vocab, wide, context=cfg.context, progress=update
        )
    return fitted


def _history(train: Recording, vocab: int, experts: int, latent: int, cfg: FitConfig) -> Any:
    start = jax.numpy.zeros((len(train.topk_idx), experts))
    return history.init_history(
        jax.random.key(0), start, vocab_size=vocab, embedding=latent, hidden=cfg.hidden
    )


def score_all(
    fitted: dict[str, Any],
    train: Recording,
    held: Recorded,
    routers: RouterParams,
    model: DecoderConfig,
) -> dict[str, np.ndarray]:
    """Scores [L - h, N, S, E] on the held-out recording, h being the horizon of each."""
    router, held_out = model.moe.router, held.routing
    experts, count = router.num_experts, held_out.topk_idx.shape[1:3]
    next_gate = baselines.next_gate_scores(held_out, routers, router)
    flat = held_out.activations.reshape(model.num_moe_layers, -1, model.d_model)

    def by_layer(ask: Callable[[int], jax.Array], layers: int) -> np.ndarray:
        rows = [np.asarray(ask(layer)) for layer in range(layers)]
        return np.stack(rows).reshape(layers, *count, experts)

    ask_llapor, correct = jax.jit(llapor.scores), jax.jit(one_layer)
    ask_entry = jax.jit(pre_attention.one_layer)
    entry = held.entering.reshape(flat.shape)
    last = model.num_moe_layers - 1
    return {
        "llapor": by_layer(lambda i: ask_llapor(fitted["llapor"], i, flat[i]), last),
        "residual": by_layer(
            lambda i: correct(
                select(fitted["residual"], i), flat[i], next_gate[i].reshape(-1, experts)
            ),
            last,
        ),
        "history": _history_scores(fitted["history"], held_out, model),
        "next_gate": next_gate,
        "token_table": baselines.token_table_scores(train, held_out, experts),
        "bigram": baselines.bigram_scores(train, held_out, experts),
        "previous_token": baselines.previous_token_scores(train, held_out, experts),
        "popularity": baselines.popular_scores(train, held_out, experts),
        "path": path_scores(fitted["path"], held_out, experts),
        "pre_attention": by_layer(
            lambda i: ask_entry(select(fitted["pre_attention"], i), entry[i]), last + 1
        ),
    }


def _history_scores(
    params: history.HistoryParams, held_out: Recording, model: DecoderConfig
) -> np.ndarray:
    features = recorded_features(held_out, params.popularity, vocab_size=model.vocab_size)
    scores = np.asarray(jax.jit(history.scores)(params, features))
    return scores.reshape(-1, *held_out.topk_idx.shape[1:3], scores.shape[-1])


def path_scores(params: path.PathParams, held_out: Recording, experts: int) -> np.ndarray:
    """Scores [L, N, S, E] of all layers from the tokens of a recording."""
    context = params.encoder.filters.shape[1]
    windows = path.recorded_windows(held_out.token_ids, context).reshape(-1, context)
    scores = np.asarray(jax.jit(path.scores)(params, windows))
    return scores.reshape(len(scores), *held_out.topk_idx.shape[1:3], experts)
