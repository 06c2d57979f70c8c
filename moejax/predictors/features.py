"""What the history predictor may know: the same numbers from a recording and while decoding.

While MoE layer l runs, a predictor scores the experts of layer l + h, the *target*, h being the
horizon. Look-ahead reads the gate input of layer l. The history predictor reads what was chosen
before: by this token in layers up to l, and by earlier tokens of the sequence in every layer, as
averages that forget at the rates `DECAYS`; a decay of 0 is the previous token itself. The first h
layers have no layer so far before them inside the step and are not predicted.

Axis letters:
    L  MoE layers    B  sequences    S  positions    T  tokens    C  width of a latent vector
    E  experts       K  experts per token            P  decays, `len(DECAYS)`
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moejax.core.errors import check
from moejax.predictors.recording import Recording

DECAYS = (0.0, 0.8)


@struct.dataclass(kw_only=True)
class HistoryFeatures:
    """Input of the history predictor for T tokens, all layers at once."""

    token: jax.Array  # int32 [1, T], 0 where ids were not recorded
    chosen: jax.Array  # int32 [L, T, K]; layer l may be read for targets after l
    ema: jax.Array  # float32 [L, T, P, E] averages of the layer's choices, earlier tokens only


@struct.dataclass(kw_only=True)
class HistoryState:
    """What stands for `HistoryFeatures` inside a jitted decoding step, kept up to date there."""

    ema: jax.Array  # float32 [L, B, P, E]
    latent: jax.Array  # float32 [B, C], what this token's choices have added up to
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


def valid_tokens(topk_idx: np.ndarray, num_experts: int) -> np.ndarray:
    """Indices into B * S of the tokens of topk_idx [L, B, S, K] that are not padding."""
    return np.flatnonzero((topk_idx[..., 0] < num_experts).any(0).ravel())


def initial_ema(start: jax.Array, batch: int) -> jax.Array:
    """float32 [..., B, P, E]: what `batch` sequences begin with, `start` [..., E] everywhere."""
    return jnp.broadcast_to(
        start[..., None, None, :], (*start.shape[:-1], batch, len(DECAYS), start.shape[-1])
    )


def update_ema(ema: jax.Array, topk_idx: jax.Array) -> jax.Array:
    """Folds one choice [..., K] per row into ema [..., P, E]; a padded token changes nothing."""
    decay = jnp.asarray(DECAYS, jnp.float32).reshape((1,) * (ema.ndim - 2) + (-1, 1))
    moved = decay * ema + (1 - decay) * multi_hot(topk_idx, ema.shape[-1])[..., None, :]
    return jnp.where(topk_idx[..., :1, None] < ema.shape[-1], moved, ema)


def recorded_features(
    recording: Recording, start: jax.Array, *, vocab_size: int, rows: np.ndarray | None = None
) -> HistoryFeatures:
    """Features of the tokens `rows` of B * S, by default all.

    Args:
        start: float32 [L, E], the average that each sequence begins with, the training popularity.
        vocab_size: 1 for recordings without token ids: all tokens are then the same to the net.

    Memory: L * T * (P * E + K) words, and once L * B * S * P * E.
    """
    if recording.tokens is None:
        check(vocab_size == 1, f"vocab_size={vocab_size}: the recording has no token ids")
    layers, batch, length, top_k = recording.topk_idx.shape
    tokens = np.zeros((batch, length), np.int32) if vocab_size == 1 else recording.token_ids
    rows = np.arange(batch * length) if rows is None else rows
    chosen = recording.topk_idx.reshape(layers, batch * length, top_k)[:, rows]
    ema = _recorded_ema(recording.topk_idx, start, np.asarray(rows, np.int32))
    token = tokens.reshape(1, -1)[:, rows].astype(np.int32)
    return HistoryFeatures(token=jnp.asarray(token), chosen=jnp.asarray(chosen), ema=ema)


@jax.jit
def _recorded_ema(topk_idx: jax.Array, start: jax.Array, rows: jax.Array) -> jax.Array:
    layers, batch, length, _ = topk_idx.shape

    def before(ema: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        return update_ema(ema, chosen), ema

    first = initial_ema(start, batch)
    _, ema = jax.lax.scan(before, first, jnp.moveaxis(topk_idx, 2, 0))  # [S, L, B, P, E]
    flat = jnp.moveaxis(ema, 0, 2).reshape(layers, batch * length, *first.shape[2:])
    return flat[:, rows]


def begin_token(state: HistoryState, token: jax.Array) -> HistoryState:
    """Call once per step, before layer 0, with the step's input tokens int32 [B]."""
    return dataclasses.replace(state, token=token.astype(jnp.int32))


def observe(state: HistoryState, layer: jax.Array, topk_idx: jax.Array) -> HistoryState:
    """Folds the choices int32 [B, K] of `layer` (int32 scalar, may be traced) into its average."""
    past = jax.lax.dynamic_index_in_dim(state.ema, layer, keepdims=False)
    ema = jax.lax.dynamic_update_index_in_dim(state.ema, update_ema(past, topk_idx), layer, 0)
    return dataclasses.replace(state, ema=ema)


def observe_prompt(state: HistoryState, topk_idx: jax.Array) -> HistoryState:
    """Folds a prefill's choices int32 [L, B, S, K] in, position by position."""

    def fold(ema: jax.Array, chosen: jax.Array) -> tuple[jax.Array, None]:
        return update_ema(ema, chosen), None

    ema, _ = jax.lax.scan(fold, state.ema, jnp.moveaxis(topk_idx, 2, 0))
    return dataclasses.replace(state, ema=ema)
