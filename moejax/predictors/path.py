"""Routing path: the experts of all layers before the first one runs.

ExpertFlow's predictor (arXiv 2410.17954) reads the tokens alone: an encoder of the context, one
light head per MoE layer, binary cross entropy. Its encoder is a small T5; here it is an embedding
of the last W tokens, each weighed per channel and filter, and an MLP, so that a decoding step keeps
W token ids and nothing else.

Axis letters:
    L  MoE layers    B  sequences    S  positions    T  tokens    W  tokens of context
    V  vocabulary    C  embedding width    R  filters    H  hidden units    E  experts
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moejax.core.errors import check

NO_TOKEN = -1  # before the start of a sequence


@struct.dataclass(kw_only=True)
class Encoder:
    """From the last W tokens to H numbers."""

    embedding: jax.Array  # [V, C]
    filters: jax.Array  # [R, W, C]
    w_in: jax.Array  # [(R + 1) * C, H]
    b_in: jax.Array  # [H]
    w_block: jax.Array  # [H, H]
    b_block: jax.Array  # [H]


@struct.dataclass(kw_only=True)
class PathParams:
    """The encoder and a head for every MoE layer."""

    encoder: Encoder
    w_out: jax.Array  # [L, H, E]
    b_out: jax.Array  # [L, E]


@struct.dataclass(kw_only=True)
class PathState:
    """What a decoding step remembers of its B sequences."""

    window: jax.Array  # int32 [B, W], the newest first, NO_TOKEN where there is none
    encoding: jax.Array  # float32 [B, H] of the token that is running


def init_path(
    key: jax.Array,
    *,
    num_layers: int,
    num_experts: int,
    vocab_size: int,
    embedding: int,
    hidden: int,
    context: int = 16,
    filters: int = 3,
) -> PathParams:
    """Parameters that score every expert alike; a filter begins as an average of some length."""
    check(context >= 2, f"context={context} must be at least 2 tokens")
    k_embedding, k_in, k_block = jax.random.split(key, 3)
    inputs = (filters + 1) * embedding
    lengths = np.geomspace(2, context, filters)
    decay = np.exp(-np.arange(context)[None] / lengths[:, None])
    start = np.repeat((decay / decay.sum(1, keepdims=True))[..., None], embedding, axis=2)
    encoder = Encoder(
        embedding=jax.random.normal(k_embedding, (vocab_size, embedding)),
        filters=jnp.asarray(start, jnp.float32),
        w_in=jax.random.normal(k_in, (inputs, hidden)) * inputs**-0.5,
        b_in=jnp.zeros((hidden,)),
        w_block=jax.random.normal(k_block, (hidden, hidden)) * hidden**-0.5,
        b_block=jnp.zeros((hidden,)),
    )
    return PathParams(
        encoder=encoder,
        w_out=jnp.zeros((num_layers, hidden, num_experts)),
        b_out=jnp.zeros((num_layers, num_experts)),
    )


def encode(params: Encoder, window: jax.Array) -> jax.Array:
    """float32 [T, H] of the last tokens int32 [T, W], the newest first.

    Cost: T * (R * W * C + (R + 1) * C * H + H * H) multiply-adds.
    """
    known = (window >= 0)[..., None]
    embedded = jnp.where(known, params.embedding[jnp.maximum(window, 0)], 0.0)  # [T, W, C]
    mixed = jnp.einsum("twc,rwc->trc", embedded, params.filters)
    x = jnp.concatenate([embedded[:, :1], mixed], axis=1).reshape(len(window), -1)
    h = jax.nn.gelu(x @ params.w_in + params.b_in[None])
    return h + jax.nn.gelu(h @ params.w_block + params.b_block[None])


def scores(params: PathParams, window: jax.Array) -> jax.Array:
    """float32 [L, T, E] for all layers from the last tokens int32 [T, W], the newest first.

    Cost: that of `encode` and L * T * H * E multiply-adds.
    """
    h = encode(params.encoder, window)
    return jnp.einsum("th,lhe->lte", h, params.w_out) + params.b_out[:, None]


def layer_scores(params: PathParams, layer: jax.Array, encoding: jax.Array) -> jax.Array:
    """float32 [T, E] for `layer` itself; past the last layer they mean nothing."""
    w_out = jax.lax.dynamic_index_in_dim(params.w_out, layer, keepdims=False)
    b_out = jax.lax.dynamic_index_in_dim(params.b_out, layer, keepdims=False)
    return encoding @ w_out + b_out[None]


def recorded_windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """int32 [B, S, W] of tokens int32 [B, S]: every token and those before it, newest first."""
    before = np.full((len(tokens), context - 1), NO_TOKEN, np.int32)
    padded = np.concatenate([before, tokens.astype(np.int32)], axis=1)
    views = np.lib.stride_tricks.sliding_window_view(padded, context, axis=1)
    return np.ascontiguousarray(views[..., ::-1])


def init_path_state(params: PathParams, batch: int) -> PathState:
    """The state before the first token of `batch` sequences."""
    context, hidden = params.encoder.filters.shape[1], params.encoder.b_in.shape[0]
    return PathState(
        window=jnp.full((batch, context), NO_TOKEN, jnp.int32),
        encoding=jnp.zeros((batch, hidden)),
    )


def begin_token(state: PathState, token: jax.Array) -> PathState:
    """Call once per step, before layer 0, with the step's input tokens int32 [B]."""
    window = jnp.concatenate([token[:, None].astype(jnp.int32), state.window[:, :-1]], axis=1)
    return dataclasses.replace(state, window=window)


def observe_prompt(state: PathState, tokens: jax.Array, mask: jax.Array) -> PathState:
    """After a prefill of tokens int32 [B, S], padded on the right where `mask` is False."""
    count = mask.sum(1, dtype=jnp.int32)[:, None]
    back = jnp.arange(state.window.shape[1], dtype=jnp.int32)[None]
    inside = jnp.clip(count - 1 - back, 0, tokens.shape[1] - 1)
    new = jnp.take_along_axis(tokens.astype(jnp.int32), inside, axis=1)
    old = jnp.take_along_axis(state.window, jnp.maximum(back - count, 0), axis=1)
    return dataclasses.replace(state, window=jnp.where(back < count, new, old))


def encode_token(params: PathParams, state: PathState, layer: jax.Array) -> PathState:
    """Reads the tokens in layer 0; in the others what it read is kept."""

    def open_token(_: jax.Array, encoding: jax.Array) -> jax.Array:
        del encoding
        return encode(params.encoder, state.window)

    # A loop of at most one trip: no branch in the program.
    first = (layer == 0).astype(jnp.int32)
    encoding = jax.lax.fori_loop(0, first, open_token, state.encoding)
    return dataclasses.replace(state, encoding=encoding)
