"""Causal self-attention of any kind, over a full sequence or a KV cache.

A kind of attention is a module (`gqa`, `mla`) with the same three functions: initial weights,
`project` to queries and to the two arrays that a position keeps, and `attend` over kept positions.

Axis letters:
    B  batch    S  new positions    C  positions of the cache    D  model dim    L  layers
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from moejax.kernels.rows import from_bits, read_part, to_bits
from moejax.layers import gqa, mla
from moejax.layers.gqa import AttentionConfig as AttentionConfig
from moejax.layers.gqa import AttentionParams as AttentionParams
from moejax.layers.gqa import init_attention as init_attention
from moejax.layers.mla import MLAConfig as MLAConfig
from moejax.layers.mla import MLAParams as MLAParams

AnyConfig: TypeAlias = AttentionConfig | MLAConfig
AnyParams: TypeAlias = AttentionParams | MLAParams


@struct.dataclass(kw_only=True)
class KVCache:
    """What all layers keep of the positions so far, and how many of each sequence are filled.

    Keys and values, or latents and rotated keys, of the shapes that `cache_dims` of the config
    says. Positions past `length` hold whatever was there; attention never looks at them. bfloat16
    may be held as its bits, uint16: XLA:CPU then updates it in place (`kernels.rows.to_bits`), XLA
    for TPU would copy it.
    """

    k: jax.Array  # [L, B, C, Hkv, Dh]
    v: jax.Array  # [L, B, C, Hkv, Dh]
    length: jax.Array  # int32 [B]


def init_any(
    key: jax.Array, d_model: int, cfg: AnyConfig, *, out_scale: float, dtype: jnp.dtype
) -> AnyParams:
    """Initial weights of the kind that `cfg` describes."""
    init: Any = mla.init_mla if isinstance(cfg, MLAConfig) else gqa.init_attention
    return init(key, d_model, cfg, out_scale=out_scale, dtype=dtype)


def self_attention(
    params: AnyParams, x: jax.Array, positions: jax.Array, cfg: AnyConfig
) -> jax.Array:
    """Causal attention of x [B, S, D] over itself, without the output's bias."""
    with jax.named_scope("attention"):
        kind = _kind(cfg)
        q, k, v = kind.project(params, x, positions, cfg)
        visible = sees(positions[:, :, None], positions[:, None, :], cfg)
        return kind.attend(params, q, k, v, visible, cfg)


def cached_attention(
    params: AnyParams,
    x: jax.Array,
    positions: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    layer: jax.Array,
    cfg: AnyConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes the new keys and values of `layer` into the cache, then attends over it.

    The cache [L, B, C, Hkv, Dh] travels as a whole so that XLA updates it in place (write phase,
    then read phase). Returns the output [B, S, D] and the updated cache.
    """
    with jax.named_scope("attention"):
        kind = _kind(cfg)
        q, k, v = kind.project(params, x, positions, cfg)
        rows = jnp.arange(x.shape[0])[:, None]
        # Positions past the end of the cache are dropped by the scatter; the caller checks sizes.
        cache_k = cache_k.at[layer, rows, positions].set(_kept_as(k, cache_k))
        cache_v = cache_v.at[layer, rows, positions].set(_kept_as(v, cache_v))
        layer_k, layer_v = _values(cache_k, layer), _values(cache_v, layer)
        slots = jnp.arange(cache_k.shape[2], dtype=positions.dtype)
        visible = sees(positions[:, :, None], slots[None, None, :], cfg)
        return kind.attend(params, q, layer_k, layer_v, visible, cfg), cache_k, cache_v


def _kept_as(new: jax.Array, cache: jax.Array) -> jax.Array:
    """Keys or values in the form that the cache holds them in."""
    return to_bits(new) if cache.dtype == jnp.uint16 else new.astype(cache.dtype)


def _values(cache: jax.Array, layer: jax.Array) -> jax.Array:
    """What the cache holds of `layer`, [B, C, Hkv, Dh]."""
    part = read_part(cache, layer)
    return from_bits(part, jnp.dtype(jnp.bfloat16)) if part.dtype == jnp.uint16 else part


def sees(query: jax.Array, key: jax.Array, cfg: AnyConfig) -> jax.Array:
    """Whether a query at one position sees the key at another; bool of their joint shape."""
    visible = key <= query
    if isinstance(cfg, AttentionConfig) and cfg.window:
        visible &= query - key < cfg.window
    if isinstance(cfg, AttentionConfig) and cfg.chunk:
        visible &= query // cfg.chunk == key // cfg.chunk
    return visible


def _kind(cfg: AnyConfig) -> Any:
    return mla if isinstance(cfg, MLAConfig) else gqa
