"""Predictors as the offloaded decoder calls them: once per layer, inside the scan over layers.

A scorer turns what layer l knows into scores for layer l + 1. In the last layer, and for padded
tokens, the scores mean nothing and the caller ignores them. A scorer closes over its parameters:
made inside a jitted step they are its arguments, made outside they are constants of the program.

Axis letters:
    L  MoE layers    B  sequences    T  tokens    D  model dim    E  experts
"""

from typing import Protocol

import jax

from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.predictors import features, history, llapor, next_gate, path, residual
from moejax.predictors.features import HistoryState
from moejax.predictors.history import HistoryParams
from moejax.predictors.llapor import LlaporParams
from moejax.predictors.path import PathParams, PathState
from moejax.predictors.residual import ResidualParams
from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams

PredictorState = HistoryState | PathState | None


class Scorer(Protocol):
    """Scores the experts of the next layer.

    Args:
        x: [T, D] gate inputs of this layer.
        routing: what this layer chose.
        layer: int32 scalar, index among the MoE layers.
        state: `HistoryState` or `PathState` of T sequences, or None for scorers that keep none.

    Returns: float32 [T, E] for layer + 1, larger is likelier, and the new state.
    """

    def __call__(
        self, x: jax.Array, routing: Routing, layer: jax.Array, state: PredictorState
    ) -> tuple[jax.Array, PredictorState]: ...


def begin_token(state: PredictorState, token: jax.Array) -> PredictorState:
    """Call once per step with the input tokens int32 [B]; nothing happens without a state."""
    if isinstance(state, PathState):
        return path.begin_token(state, token)
    return None if state is None else features.begin_token(state, token)


def next_gate_scorer(routers: RouterParams, cfg: RouterConfig) -> Scorer:
    """Look-ahead by the stacked routers [L, ...]; keeps no state."""

    def score(x, routing, layer, state):
        with jax.named_scope("predict_next_gate"):
            return next_gate.scores(routers, layer, x, cfg), state

    return score


def residual_scorer(params: ResidualParams, routers: RouterParams, cfg: RouterConfig) -> Scorer:
    """Learned look-ahead; keeps no state."""

    def score(x, routing, layer, state):
        with jax.named_scope("predict_residual"):
            return residual.scores(params, layer, x, routers, cfg), state

    return score


def llapor_scorer(params: LlaporParams) -> Scorer:
    """LLaPor; keeps no state."""

    def score(x, routing, layer, state):
        with jax.named_scope("predict_llapor"):
            return llapor.scores(params, layer, x), state

    return score


def path_scorer(params: PathParams) -> Scorer:
    """The routing path; its state is `path.init_path_state(params, B)`.

    The encoder runs in layer 0 and what it read is kept for the others. One token per sequence.
    """

    def score(x, routing, layer, state):
        _check_rows("path", routing, state.window)
        with jax.named_scope("predict_path"):
            state = path.encode_token(params, state, layer)
            return path.layer_scores(params, layer + 1, state.encoding), state

    return score


def history_scorer(params: HistoryParams) -> Scorer:
    """Routing history; its state is `history.init_state(params, B)`.

    One token per sequence: prefill is recorded by `observe_prompt`, not predicted.
    """

    def score(x, routing, layer, state):
        _check_rows("history", routing, state.latent)
        with jax.named_scope("predict_history"):
            state = history.follow(params, state, layer, routing.topk_idx)
            return history.ask(params, state, layer), state

    return score


def _check_rows(name: str, routing: Routing, kept: jax.Array) -> None:
    """Refuses a prefill, for which the state has too few rows."""
    rows, sequences = routing.topk_idx.shape[0], kept.shape[0]
    check(
        rows == sequences,
        f"the {name} scorer wants one token of each of {sequences} sequences, got {rows} rows",
    )
