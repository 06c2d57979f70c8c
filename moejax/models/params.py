"""A decoder's weights and its empty KV cache.

Axis letters:
    D  model dim    V  vocabulary    L  layers    E  experts    F  hidden dim of an expert
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from moejax.experts.gated import init_experts
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.rows import to_bits
from moejax.layers.attention import AnyParams, KVCache, init_any
from moejax.layers.moe import MoEParams, init_moe
from moejax.layers.norm import NormParams, init_norm
from moejax.models.config import AnyGroup, DecoderConfig, LayerGroup


@struct.dataclass(kw_only=True)
class LayerParams:
    """One layer; in `DecoderParams` every leaf has a leading [num_layers] of its group."""

    attention_norm: NormParams  # [D]
    attention: AnyParams
    mlp_norm: NormParams  # [D]
    mlp: MoEParams | GatedWeights
    dense: GatedWeights | None = None  # beside `mlp` in a layer with a shortcut


GroupParams: TypeAlias = LayerParams | tuple[LayerParams, ...]


@struct.dataclass(kw_only=True)
class DecoderParams:
    """All weights; `w_out` is None when the embedding is tied, `b_out` without `out_bias`.

    A group's entry is its stacked layers; a cycle's is one entry per group of its own, with a
    leading [repeats] before the layers' axis.
    """

    embed: jax.Array  # [V, D]
    groups: tuple[GroupParams, ...]
    final_norm: NormParams  # [D]
    w_out: jax.Array | None  # [D, V]
    b_out: jax.Array | None = None  # [V]


def init_decoder(key: jax.Array, cfg: DecoderConfig) -> DecoderParams:
    """Random weights; residual branches are shrunk by sqrt(2 * num_layers)."""
    dtype, d = cfg.jnp_dtype, cfg.d_model
    k_embed, k_out, *k_groups = jax.random.split(key, 2 + len(cfg.groups))
    embed = jax.random.normal(k_embed, (cfg.vocab_size, d)) * 0.02
    w_out = jax.random.normal(k_out, (d, cfg.vocab_size)) * (0.5 * d**-0.5)
    return DecoderParams(
        embed=embed.astype(dtype),
        groups=tuple(_init_group(k, g, cfg) for k, g in zip(k_groups, cfg.groups, strict=True)),
        final_norm=init_norm(cfg.norm, d, dtype),
        w_out=None if cfg.tie_embeddings else w_out.astype(dtype),
        b_out=jnp.zeros((cfg.vocab_size,), dtype) if cfg.out_bias else None,
    )


def _init_group(key: jax.Array, group: AnyGroup, cfg: DecoderConfig) -> Any:
    if isinstance(group, LayerGroup):
        keys = jax.random.split(key, group.num_layers)
        return jax.vmap(lambda k: _init_layer(k, group, cfg))(keys)
    parts = group.groups

    def once(key: jax.Array) -> tuple[GroupParams, ...]:
        return tuple(_init_group(jax.random.fold_in(key, i), p, cfg) for i, p in enumerate(parts))

    return jax.vmap(once)(jax.random.split(key, group.repeats))


def _init_layer(key: jax.Array, group: LayerGroup, cfg: DecoderConfig) -> LayerParams:
    dtype, d, out_scale = cfg.jnp_dtype, cfg.d_model, (2 * cfg.num_layers) ** -0.5
    k_attention, k_mlp = jax.random.split(key)
    kind = group.attention or cfg.attention
    mlp: Any = None
    dense: Any = None
    if group.d_ff:
        k_dense = jax.random.fold_in(k_mlp, 1) if group.moe else k_mlp
        dense = init_experts(k_dense, (), d, group.d_ff, out_scale=out_scale, dtype=dtype)
    if group.moe:
        mlp = init_moe(k_mlp, d, group.moe, out_scale=out_scale, dtype=dtype)
    else:
        mlp, dense = dense, None
    return LayerParams(
        attention_norm=init_norm(cfg.norm, d, dtype),
        attention=init_any(k_attention, d, kind, out_scale=out_scale, dtype=dtype),
        mlp_norm=init_norm(cfg.norm, d, dtype),
        mlp=mlp,
        dense=dense,
    )


def init_cache(cfg: DecoderConfig, batch: int, capacity: int, *, as_bits: bool = False) -> KVCache:
    """An empty KV cache of `capacity` positions; `as_bits` is what CPU wants, see `KVCache`."""
    shapes = ((cfg.num_layers, batch, capacity, *dims) for dims in cfg.attention.cache_dims)
    k, v = (jnp.zeros(shape, cfg.jnp_dtype) for shape in shapes)
    return KVCache(
        k=to_bits(k) if as_bits else k,
        v=to_bits(v) if as_bits else v,
        length=jnp.zeros((batch,), jnp.int32),
    )
