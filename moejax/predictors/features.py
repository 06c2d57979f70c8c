"""What a predictor may know: the same features from a recording and while decoding.

While MoE layer l runs, a predictor scores the experts of layer l + 1, the *target*. Look-ahead
reads the gate input of layer l. The history predictor reads what was chosen before: by this token
in layers up to l, and by earlier tokens of the sequence in the target layer. Layer 0 has no layer
before it inside the step and is not predicted; per-target arrays have L - 1 entries, entry l for
target l + 1.

Axis letters:
    L  MoE layers    B  sequences    S  positions    T  tokens    D  model dim
    E  experts       K  experts per token            R  recent layers, `NUM_RECENT`
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moejax.predictors.recording import Recording

NUM_RECENT = 4
EMA_DECAY = 0.9


@struct.dataclass(kw_only=True)
class HistoryFeatures:
    """Input of the history predictor in layer l; leading [L - 1] where layers are stacked."""

    token: jax.Array  # int32 [T]
    recent: jax.Array  # int32 [T, R, K] choices of layers l, l-1, ...; E where there is none
    ema: jax.Array  # float32 [T, E] average of the target layer's choices, earlier tokens only


@struct.dataclass(kw_only=True)
class HistoryState:
    """What `HistoryFeatures` are read from, kept up to date inside a jitted decoding step."""

    ema: jax.Array  # float32 [L, B, E]
    recent: jax.Array  # int32 [B, R, K]
    token: jax.Array  # int32 [B]


def multi_hot(topk_idx: jax.Array, num_experts: int) -> jax.Array:
    """float32 [..., E], 1 at the chosen experts of topk_idx [..., K]; ids of E choose nothing."""
    return jax.nn.one_hot(topk_idx, num_experts, dtype=jnp.float32).sum(-2)


def popularity(topk_idx: np.ndarray, num_experts: int) -> np.ndarray:
    """float32 [L, E]: fraction of the tokens of topk_idx [L, ..., K] that chose each expert."""
    rows = topk_idx.reshape(len(topk_idx), -1, topk_idx.shape[-1])
    tokens = (rows[..., 0] < num_experts).sum(1)
    counts = [np.bincount(row.ravel(), minlength=num_experts)[:num_experts] for row in rows]
    return (np.stack(counts) / np.maximum(tokens, 1)[:, None]).astype(np.float32)


def update_ema(ema: jax.Array, topk_idx: jax.Array) -> jax.Array:
    """Folds one choice [..., K] per row into ema [..., E]; a padded token changes nothing."""
    num_experts = ema.shape[-1]
    moved = EMA_DECAY * ema + (1 - EMA_DECAY) * multi_hot(topk_idx, num_experts)
    return jnp.where(topk_idx[..., :1] < num_experts, moved, ema)


def recorded_features(recording: Recording, start: jax.Array) -> HistoryFeatures:
    """Features of every token of a recording, T = B * S, with leading axis [L - 1].

    `start` float32 [L, E] is the average that each sequence begins with, the training popularity.
    Memory: (L - 1) * T * (E + R * K + 1) words.
    """
    recent, ema = _recorded_history(recording.topk_idx, start)
    token = recording.token_ids.astype(np.int32).reshape(1, -1)
    return HistoryFeatures(token=jnp.broadcast_to(token, ema.shape[:2]), recent=recent, ema=ema)


@jax.jit
def _recorded_history(topk_idx: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    num_layers, batch, length, top_k = topk_idx.shape
    num_experts, targets = start.shape[1], num_layers - 1

    def before(ema: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        return update_ema(ema, chosen), ema

    first = jnp.broadcast_to(start[1:, None], (targets, batch, num_experts))
    _, ema = jax.lax.scan(before, first, jnp.moveaxis(topk_idx[1:], 2, 0))  # [S, L - 1, B, E]
    none = jnp.full((NUM_RECENT - 1, *topk_idx.shape[1:]), num_experts, topk_idx.dtype)
    padded = jnp.concatenate([none, topk_idx])  # layer l is at l + R - 1
    shifts = [padded[NUM_RECENT - 1 - r :][:targets] for r in range(NUM_RECENT)]
    recent = jnp.stack(shifts, axis=-2).reshape(targets, batch * length, NUM_RECENT, top_k)
    return recent, jnp.moveaxis(ema, 0, 2).reshape(targets, batch * length, num_experts)


def init_history_state(start: jax.Array, batch: int, top_k: int) -> HistoryState:
    """The state before the first token of `batch` sequences; `start` float32 [L, E]."""
    num_layers, num_experts = start.shape
    return HistoryState(
        ema=jnp.broadcast_to(start[:, None], (num_layers, batch, num_experts)),
        recent=jnp.full((batch, NUM_RECENT, top_k), num_experts, jnp.int32),
        token=jnp.zeros((batch,), jnp.int32),
    )


def begin_token(state: HistoryState, token: jax.Array) -> HistoryState:
    """Call once per step, before layer 0, with the step's input tokens int32 [B]."""
    none = jnp.full_like(state.recent, state.ema.shape[-1])
    return dataclasses.replace(state, recent=none, token=token.astype(jnp.int32))


def observe(state: HistoryState, layer: jax.Array, topk_idx: jax.Array) -> HistoryState:
    """Call in every layer (int32 scalar, may be traced) with its choices int32 [B, K]."""
    past = jax.lax.dynamic_index_in_dim(state.ema, layer, keepdims=False)
    ema = jax.lax.dynamic_update_index_in_dim(state.ema, update_ema(past, topk_idx), layer, 0)
    recent = jnp.concatenate([topk_idx[:, None], state.recent[:, :-1]], axis=1)
    return dataclasses.replace(state, ema=ema, recent=recent)


def observe_prompt(state: HistoryState, topk_idx: jax.Array) -> HistoryState:
    """Folds a prefill's choices int32 [L, B, S, K] in, position by position."""

    def fold(ema: jax.Array, chosen: jax.Array) -> tuple[jax.Array, None]:
        return update_ema(ema, chosen), None

    ema, _ = jax.lax.scan(fold, state.ema, jnp.moveaxis(topk_idx, 2, 0))
    return dataclasses.replace(state, ema=ema)


def current_features(state: HistoryState, layer: jax.Array) -> HistoryFeatures:
    """Features in `layer`, after its `observe`, for target `layer + 1`."""
    ema = jax.lax.dynamic_index_in_dim(state.ema, layer + 1, keepdims=False)
    return HistoryFeatures(token=state.token, recent=state.recent, ema=ema)
