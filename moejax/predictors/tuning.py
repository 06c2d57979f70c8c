"""Online tuning of LLaPor: a step of gradient where it has been wrong lately.

Each layer remembers its last `window` tokens. Once they are complete and more than `threshold` of
the experts that they chose were not among its best (PreScope, arXiv 2509.23638: 10 % of 64 tokens),
the layer takes one step on them; the others stay as they are. The compression never changes.

Axis letters:
    L  MoE layers    T  tokens    D  model dim    W  tokens remembered    K  experts per token
    E  experts
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.predictors.fit import set_loss
from moejax.predictors.llapor import LlaporParams, all_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """When a layer is tuned and how far it moves."""

    window: int = 64
    threshold: float = 0.1
    learning_rate: float = 0.05

    def __post_init__(self):
        check(self.window >= 1, f"window={self.window} must be at least 1")
        check(0 <= self.threshold <= 1, f"threshold={self.threshold} must be between 0 and 1")
        check(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive")


@struct.dataclass(kw_only=True)
class TuningState:
    """The last tokens of every predicting layer."""

    hidden: jax.Array  # [L - 1, W, D]
    chosen: jax.Array  # int32 [L - 1, W, K], of the layer after; E where there is none yet
    wrong: jax.Array  # float32 [L - 1, W], share of the chosen that were not predicted
    seen: jax.Array  # int32 [], tokens since the start


def init_tuning(params: LlaporParams, *, top_k: int, cfg: TuningConfig) -> TuningState:
    """No tokens yet."""
    layers = params.edge.w_in.shape[0] + params.middle.w_in.shape[0]
    d_model, num_experts = params.middle_inputs.basis.shape[1], params.middle.b_out.shape[-1]
    return TuningState(
        hidden=jnp.zeros((layers, cfg.window, d_model)),
        chosen=jnp.full((layers, cfg.window, top_k), num_experts, jnp.int32),
        wrong=jnp.zeros((layers, cfg.window)),
        seen=jnp.int32(0),
    )


def tune(
    params: LlaporParams,
    state: TuningState,
    hidden: jax.Array,
    chosen: jax.Array,
    cfg: TuningConfig,
) -> tuple[LlaporParams, TuningState, jax.Array]:
    """Remembers T tokens and takes a step in the layers that are wrong too often.

    Args:
        hidden: gate inputs [L - 1, T, D] of the layers 0 .. L - 2, T at most W.
        chosen: int32 [L - 1, T, K] of the layers 1 .. L - 1.

    Returns the parameters, the state and which layers were tuned, bool [L - 1]. Cost: T forward
    passes; where a layer is tuned, W forward and backward passes of all layers.
    """
    with jax.named_scope("predictor_tuning"):
        scores = all_scores(params, hidden)
        state = TuningState(
            hidden=_push(state.hidden, hidden),
            chosen=_push(state.chosen, chosen),
            wrong=_push(state.wrong, missed(scores, chosen)),
            seen=state.seen + hidden.shape[1],
        )
        full = state.seen >= cfg.window
        wanted = full & (state.wrong.mean(1) > cfg.threshold)
        params = jax.lax.cond(
            wanted.any(), lambda p: _step(p, state, wanted, cfg), lambda p: p, params
        )
        return params, state, wanted


def missed(scores: jax.Array, chosen: jax.Array) -> jax.Array:
    """float32 [L - 1, T]: share of the chosen that are not among the K best scores."""
    top_k, num_experts = chosen.shape[-1], scores.shape[-1]
    _, best = jax.lax.top_k(scores, top_k)
    hits = (best[..., None, :] == chosen[..., None]).any(-1)
    real = chosen < num_experts
    return 1 - (hits & real).sum(-1) / jnp.maximum(real.sum(-1), 1)


def _push(memory: jax.Array, new: jax.Array) -> jax.Array:
    """The last W of [L - 1, W, ...] and [L - 1, T, ...]."""
    joined = jnp.concatenate([memory, new.astype(memory.dtype)], axis=1)
    return joined[:, -memory.shape[1] :]


def _step(
    params: LlaporParams, state: TuningState, wanted: jax.Array, cfg: TuningConfig
) -> LlaporParams:
    def loss(nets: tuple) -> jax.Array:
        own = dataclasses.replace(params, edge=nets[0], middle=nets[1])
        return set_loss(all_scores(own, state.hidden), state.chosen)

    nets = params.edge, params.middle
    grads = jax.grad(loss)(nets)
    edges = params.edge.w_in.shape[0] // 2
    middles = params.middle.w_in.shape[0]
    ends = jnp.concatenate([wanted[:edges], wanted[edges + middles :]])

    def move(which: jax.Array):
        def one(p: jax.Array, g: jax.Array) -> jax.Array:
            return p - cfg.learning_rate * g * which.astype(p.dtype).reshape(
                -1, *[1] * (p.ndim - 1)
            )

        return one

    inside = wanted[edges : edges + middles]
    return dataclasses.replace(
        params,
        edge=jax.tree.map(move(ends), nets[0], grads[0]),
        middle=jax.tree.map(move(inside), nets[1], grads[1]),
    )
