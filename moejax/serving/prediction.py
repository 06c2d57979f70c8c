"""Predictors as the engine carries them: parameters, a scorer over them, and per-sequence state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from moejax.core.errors import InputError, check
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.models.experts import stack_moe
from moejax.offload.prefetch import Scorer
from moejax.predictors import features, path, scorers
from moejax.predictors.history import HistoryParams, init_state
from moejax.predictors.llapor import LlaporParams
from moejax.predictors.path import PathParams, PathState, init_path_state
from moejax.predictors.residual import ResidualParams
from moejax.predictors.scorers import PredictorState
from moejax.predictors.store import Predictor, describe
from moejax.routing.gates import RouterParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What to prefetch.

    Attributes:
        params: arrays of the predictor, an argument of the compiled step.
        scorer: params -> `offload.prefetch.Scorer`.
        init: (params, batch) -> state before the first token, None for stateless predictors.
    """

    params: Any
    scorer: Callable[[Any], Scorer]
    init: Callable[[Any, int], PredictorState] = lambda params, batch: None


def begin_token(state: PredictorState, token: jax.Array) -> PredictorState:
    """Tells the predictor the tokens int32 [B] that the step is about to run."""
    return scorers.begin_token(state, token)


def see_prompt(
    state: PredictorState, topk_idx: jax.Array, tokens: jax.Array, mask: jax.Array
) -> PredictorState:
    """Tells the predictor of a prefill: tokens int32 [B, S] and their routing [L, B * S, K]."""
    if state is None:
        return None
    if isinstance(state, PathState):
        return path.observe_prompt(state, tokens, mask)
    layers, _, top_k = topk_idx.shape
    return features.observe_prompt(state, topk_idx.reshape(layers, *tokens.shape, top_k))


def stack_routers(params: DecoderParams, cfg: DecoderConfig) -> RouterParams:
    """The routers of all MoE layers with leading axis L."""
    return stack_moe(params, cfg, lambda moe: moe.router)


def next_gate(params: DecoderParams, cfg: DecoderConfig) -> Prediction:
    """The next layer's own router on this layer's gate input."""
    router_cfg = cfg.moe.router
    return Prediction(
        params=stack_routers(params, cfg),
        scorer=lambda routers: scorers.next_gate_scorer(routers, router_cfg),
    )


def residual(learned: ResidualParams, params: DecoderParams, cfg: DecoderConfig) -> Prediction:
    """Learned look-ahead on the hidden state."""
    router_cfg = cfg.moe.router
    return Prediction(
        params=(learned, stack_routers(params, cfg)),
        scorer=lambda both: scorers.residual_scorer(both[0], both[1], router_cfg),
    )


def history(learned: HistoryParams) -> Prediction:
    """Routing history alone."""
    return Prediction(params=learned, scorer=scorers.history_scorer, init=init_state)


def check_fits(learned: Predictor, cfg: DecoderConfig) -> None:
    """Raises `InputError` for a fitted predictor whose sizes are those of another model."""
    kind, sizes = describe(learned)
    own = {
        "num_layers": cfg.num_moe_layers,
        "num_experts": cfg.moe.num_experts,
        "d_model": cfg.d_model,
        "vocab_size": cfg.vocab_size,
    }
    wrong = [f"{k}={v}, not {own[k]}" for k, v in sizes.items() if own.get(k, v) != v]
    check(not wrong, f"the {kind} predictor was fitted to another model: {'; '.join(wrong)}")


def fitted(learned: Predictor, params: DecoderParams, cfg: DecoderConfig) -> Prediction:
    """A predictor of `predictors.store`; `InputError` for one of another model."""
    check_fits(learned, cfg)
    if isinstance(learned, ResidualParams):
        return residual(learned, params, cfg)
    if isinstance(learned, HistoryParams):
        return history(learned)
    if isinstance(learned, LlaporParams):
        return Prediction(params=learned, scorer=scorers.llapor_scorer)
    if isinstance(learned, PathParams):
        return Prediction(params=learned, scorer=scorers.path_scorer, init=init_path_state)
    raise InputError(
        f"the {describe(learned)[0]} predictor reads what enters a layer's own attention; "
        "prefetching asks one layer ahead"
    )
