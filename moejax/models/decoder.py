"""A pre-norm decoder, scanned over groups of equal layers.

Axis letters:
    B  batch    S  positions    T  tokens, B * S    D  model dim    V  vocabulary
    L  layers (Lm of them MoE)  E  experts          K  experts per token
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.core.structs import MoEMetrics
from moejax.experts.gated import gated_mlp, init_experts
from moejax.experts.stage import Stage, resident
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.layers.attention import (
    AttentionParams,
    KVCache,
    cached_attention,
    init_attention,
    self_attention,
)
from moejax.layers.moe import MoEParams, init_moe, moe
from moejax.layers.norm import rms_norm
from moejax.layers.parallel import ALONE, Parallel
from moejax.models.config import DecoderConfig, LayerGroup


@struct.dataclass(kw_only=True)
class LayerParams:
    """One layer; in `DecoderParams` every leaf has a leading [num_layers] of its group."""

    attention_norm: jax.Array  # [D]
    attention: AttentionParams
    mlp_norm: jax.Array  # [D]
    mlp: MoEParams | GatedWeights


@struct.dataclass(kw_only=True)
class DecoderParams:
    """All weights; `w_out` is None when the embedding is tied."""

    embed: jax.Array  # [V, D]
    groups: tuple[LayerParams, ...]
    final_norm: jax.Array  # [D]
    w_out: jax.Array | None  # [D, V]


@struct.dataclass(kw_only=True)
class Record:
    """What the MoE layers saw and chose, leading axis Lm. Costs nothing where it is not used."""

    hidden: jax.Array  # [Lm, T, D] gate inputs
    topk_idx: jax.Array  # int32 [Lm, T, K]
    topk_weights: jax.Array  # float32 [Lm, T, K]
    router_logits: jax.Array  # float32 [Lm, T, E]


@struct.dataclass(kw_only=True)
class Output:
    """Result of `forward`."""

    logits: jax.Array  # float32 [B, S, V]
    cache: KVCache | None
    stage_state: Any
    metrics: MoEMetrics  # leading axis Lm
    record: Record


def init_decoder(key: jax.Array, cfg: DecoderConfig) -> DecoderParams:
    """Random weights; residual branches are shrunk by sqrt(2 * num_layers)."""
    dtype, d = cfg.jnp_dtype, cfg.d_model
    out_scale = (2 * cfg.num_layers) ** -0.5
    k_embed, k_out, *k_groups = jax.random.split(key, 2 + len(cfg.groups))

    def layer(key: jax.Array, group: LayerGroup) -> LayerParams:
        k_attention, k_mlp = jax.random.split(key)
        if group.moe:
            mlp = init_moe(k_mlp, d, group.moe, out_scale=out_scale, dtype=dtype)
        else:
            mlp = init_experts(k_mlp, (), d, group.d_ff, out_scale=out_scale, dtype=dtype)
        return LayerParams(
            attention_norm=jnp.ones((d,), dtype),
            attention=init_attention(
                k_attention, d, cfg.attention, out_scale=out_scale, dtype=dtype
            ),
            mlp_norm=jnp.ones((d,), dtype),
            mlp=mlp,
        )

    def stacked(key: jax.Array, group: LayerGroup) -> LayerParams:
        return jax.vmap(lambda k: layer(k, group))(jax.random.split(key, group.num_layers))

    embed = jax.random.normal(k_embed, (cfg.vocab_size, d)) * 0.02
    w_out = jax.random.normal(k_out, (d, cfg.vocab_size)) * (0.5 * d**-0.5)
    return DecoderParams(
        embed=embed.astype(dtype),
        groups=tuple(stacked(k, g) for k, g in zip(k_groups, cfg.groups, strict=True)),
        final_norm=jnp.ones((d,), dtype),
        w_out=None if cfg.tie_embeddings else w_out.astype(dtype),
    )


def init_cache(cfg: DecoderConfig, batch: int, capacity: int) -> KVCache:
    """An empty KV cache of `capacity` positions."""
    attention = cfg.attention
    shape = (cfg.num_layers, batch, capacity, attention.num_kv_heads, attention.head_dim)
    return KVCache(
        k=jnp.zeros(shape, cfg.jnp_dtype),
        v=jnp.zeros(shape, cfg.jnp_dtype),
        length=jnp.zeros((batch,), jnp.int32),
    )


def forward(
    params: DecoderParams,
    tokens: jax.Array,
    cfg: DecoderConfig,
    *,
    cache: KVCache | None = None,
    mask: jax.Array | None = None,
    forced_idx: jax.Array | None = None,
    stage: Stage = resident,
    stage_state: Any = None,
    parallel: Parallel = ALONE,
) -> Output:
    """Runs the decoder on tokens int32 [B, S].

    Args:
        cache: continues after its `length`; the caller leaves room for S more positions. Without
            one the sequences start at position 0 and nothing is kept.
        mask: bool [B, S], False for padding on the right of each row. Padding is not routed, is
            seen by no other position and does not advance the cache.
        forced_idx: int32 [Lm, T, K], replays recorded routing.
        stage, stage_state: see `moejax.experts.stage`.
        parallel: how arrays are split, when inside `shard_map`; metrics are those of all tokens.

    Returns: `Output`; metrics and record have one entry per MoE layer.
    """
    batch, length = tokens.shape
    _check_shapes(tokens, cfg, cache, mask, forced_idx)
    outer = parallel.unshard(dataclasses.replace(params, groups=()))
    with jax.named_scope("embed"):
        x = outer.embed[tokens] * jnp.asarray(cfg.embed_scale, cfg.jnp_dtype)
    start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.length
    positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    flat_mask = None if mask is None else mask.reshape(-1)

    k, v = (None, None) if cache is None else (cache.k, cache.v)

    def layer(carry, step, group):
        return _layer(carry, step, cfg, group, positions, flat_mask, stage, parallel)

    carry, traces = _scan_groups(layer, (x, k, v, stage_state), params, cfg, forced_idx)
    x, k, v, stage_state = carry
    metrics, record = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *traces)
    if cache is not None:
        assert k is not None and v is not None
        taken = jnp.full((batch,), length) if mask is None else mask.sum(1)
        cache = KVCache(k=k, v=v, length=start + taken.astype(jnp.int32))
    return Output(
        logits=unembed(outer, x, cfg),
        cache=cache,
        stage_state=stage_state,
        metrics=metrics,
        record=record,
    )


def _scan_groups(layer, carry, params, cfg, forced_idx):
    """Runs `layer(carry, step, group)` over all layers, one scan per group of equal ones."""
    traces, first, first_moe = [], 0, 0
    for group, layers in zip(cfg.groups, params.groups, strict=True):
        n = group.num_layers
        forced = None
        if group.moe and forced_idx is not None:
            forced = forced_idx[first_moe : first_moe + n]
        index = jnp.arange(n, dtype=jnp.int32)
        steps = (layers, first + index, first_moe + index, forced)
        carry, trace = jax.lax.scan(partial(layer, group=group), carry, steps)
        first += n
        if group.moe:
            first_moe += n
            traces.append(trace)
    return carry, traces


def unembed(params: DecoderParams, x: jax.Array, cfg: DecoderConfig) -> jax.Array:
    """float32 logits [B, S, V] of the last hidden states [B, S, D]."""
    with jax.named_scope("unembed"):
        x = rms_norm(x, params.final_norm, cfg.norm_eps)
        w_out = params.embed.T if params.w_out is None else params.w_out
        return jnp.einsum("bsd,dv->bsv", x, w_out, preferred_element_type=jnp.float32)


def _check_shapes(tokens, cfg, cache, mask, forced_idx):
    """Raises `InputError` for arguments that do not fit `tokens`."""
    layers, (batch, length) = cfg.num_moe_layers, tokens.shape
    check(layers >= 1, "a decoder without MoE layers has nothing to record")
    if cache is not None:
        held, capacity = cache.k.shape[1:3]
        check(held == batch, f"the cache holds {held} sequences, tokens {batch}")
        check(
            length <= capacity, f"{length} positions exceed the {capacity} of the cache's capacity"
        )
    if mask is not None:
        check(mask.shape == tokens.shape, f"mask is {mask.shape}, tokens are {tokens.shape}")
    if forced_idx is not None:
        want = (layers, batch * length, cfg.moe.router.top_k)
        check(forced_idx.shape == want, f"forced_idx is {forced_idx.shape}, expected {want}")


def _layer(carry, step, cfg, group, positions, flat_mask, stage, parallel):
    x, cache_k, cache_v, stage_state = carry
    params, layer, moe_layer, forced_idx = step
    batch, length, d = x.shape
    params = parallel.unshard(params)
    h = parallel.split(rms_norm(x, params.attention_norm, cfg.norm_eps))
    if cache_k is None:
        mixed = self_attention(params.attention, h, positions, cfg.attention)
    else:
        mixed, cache_k, cache_v = cached_attention(
            params.attention, h, positions, cache_k, cache_v, layer, cfg.attention
        )
    x = x + parallel.merge(mixed)
    h = rms_norm(x, params.mlp_norm, cfg.norm_eps).reshape(batch * length, d)
    if group.moe is None:
        y, trace = parallel.merge(gated_mlp(params.mlp, parallel.split(h))), None
    else:
        y, routing, stage_state, metrics = moe(
            params.mlp,
            h,
            group.moe,
            mask=flat_mask,
            forced_idx=forced_idx,
            stage=stage,
            stage_state=stage_state,
            layer=moe_layer,
            parallel=parallel,
        )
        trace = (
            metrics,
            Record(
                hidden=h,
                topk_idx=routing.topk_idx,
                topk_weights=routing.topk_weights,
                router_logits=routing.router_logits,
            ),
        )
    return (x + y.reshape(batch, length, d), cache_k, cache_v, stage_state), trace
