"""Grouped-query attention with rope, over a full sequence or a KV cache.

Axis letters:
    B  batch       S  new positions    C  positions of the cache
    H  heads       Hkv  KV heads       Dh  head dim        D  model dim
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.layers.rope import rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Static description of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0

    def __post_init__(self):
        h, kv = self.num_heads, self.num_kv_heads
        check(h >= 1 and kv >= 1, f"num_heads={h} and num_kv_heads={kv} must be at least 1")
        check(h % kv == 0, f"num_heads={h} is not divisible by num_kv_heads={kv}")
        dim = self.head_dim
        check(dim >= 2 and dim % 2 == 0, f"head_dim={dim} must be positive and even for rope")


@struct.dataclass(kw_only=True)
class AttentionParams:
    """Weights of one attention layer."""

    w_q: jax.Array  # [D, H, Dh]
    w_k: jax.Array  # [D, Hkv, Dh]
    w_v: jax.Array  # [D, Hkv, Dh]
    w_o: jax.Array  # [H, Dh, D]


@struct.dataclass(kw_only=True)
class KVCache:
    """Keys and values of all layers, and how many positions of each sequence are filled.

    Positions past `length` hold whatever was there; attention never looks at them.
    """

    k: jax.Array  # [L, B, C, Hkv, Dh]
    v: jax.Array  # [L, B, C, Hkv, Dh]
    length: jax.Array  # int32 [B]


def init_attention(
    key: jax.Array, d_model: int, cfg: AttentionConfig, *, out_scale: float, dtype: jnp.dtype
) -> AttentionParams:
    """Normal weights of variance 1 / fan-in; `out_scale` shrinks the residual branch."""
    h, kv, dh = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

    def normal(name: int, shape: tuple[int, ...], std: float) -> jax.Array:
        return (jax.random.normal(jax.random.fold_in(key, name), shape) * std).astype(dtype)

    return AttentionParams(
        w_q=normal(0, (d_model, h, dh), d_model**-0.5),
        w_k=normal(1, (d_model, kv, dh), d_model**-0.5),
        w_v=normal(2, (d_model, kv, dh), d_model**-0.5),
        w_o=normal(3, (h, dh, d_model), out_scale * (h * dh) ** -0.5),
    )


def project_qkv(
    params: AttentionParams, x: jax.Array, positions: jax.Array, cfg: AttentionConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries [B, S, H, Dh], rotated keys and values [B, S, Hkv, Dh] of x [B, S, D]."""
    q = jnp.einsum("bsd,dhe->bshe", x, params.w_q)
    k = jnp.einsum("bsd,dhe->bshe", x, params.w_k)
    v = jnp.einsum("bsd,dhe->bshe", x, params.w_v)
    theta = cfg.rope_theta
    return rope(q, positions, theta), rope(k, positions, theta), v


def attend(
    params: AttentionParams, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> jax.Array:
    """Softmax attention and output projection.

    Args:
        q: [B, S, H, Dh]; k, v: [B, C, Hkv, Dh]; visible: bool [B or 1, S, C].

    Returns: [B, S, D]. Scores and softmax are float32.
    """
    batch, length, heads, dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    scores = jnp.einsum("bsgqe,bcge->bgqsc", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * dim**-0.5, -1e30)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bgqsc,bcge->bsgqe", probs, v).reshape(batch, length, heads, dim)
    return jnp.einsum("bshe,hed->bsd", mixed, params.w_o)


def self_attention(
    params: AttentionParams, x: jax.Array, positions: jax.Array, cfg: AttentionConfig
) -> jax.Array:
    """Causal attention of x [B, S, D] over itself."""
    with jax.named_scope("attention"):
        q, k, v = project_qkv(params, x, positions, cfg)
        causal = positions[:, :, None] >= positions[:, None, :]
        return attend(params, q, k, v, causal)


def cached_attention(
    params: AttentionParams,
    x: jax.Array,
    positions: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    layer: jax.Array,
    cfg: AttentionConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes the new keys and values of `layer` into the cache, then attends over it.

    The cache [L, B, C, Hkv, Dh] travels as a whole so that XLA updates it in place (write phase,
    then read phase). Returns the output [B, S, D] and the updated cache.
    """
    with jax.named_scope("attention"):
        q, k, v = project_qkv(params, x, positions, cfg)
        rows = jnp.arange(x.shape[0])[:, None]
        # Positions past the end of the cache are dropped by the scatter; the caller checks sizes.
        cache_k = cache_k.at[layer, rows, positions].set(k.astype(cache_k.dtype))
        cache_v = cache_v.at[layer, rows, positions].set(v.astype(cache_v.dtype))
        layer_k = jax.lax.dynamic_index_in_dim(cache_k, layer, 0, keepdims=False)
        layer_v = jax.lax.dynamic_index_in_dim(cache_v, layer, 0, keepdims=False)
        slots = jnp.arange(cache_k.shape[2])
        visible = slots[None, None, :] <= positions[:, :, None]
        return attend(params, q, layer_k, layer_v, visible), cache_k, cache_v
