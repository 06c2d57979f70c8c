"""A pre-norm decoder, scanned over groups of equal layers.

Axis letters:
    B  batch    S  positions    T  tokens, B * S    D  model dim    V  vocabulary
    L  layers (Lm of them MoE)  E  experts          K  experts per token
"""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.core.structs import MoEMetrics
from moejax.experts.gated import gated_mlp
from moejax.experts.stage import Stage, resident
from moejax.kernels.rows import read_layer
from moejax.layers.attention import KVCache, cached_attention, self_attention
from moejax.layers.gqa import AttentionParams, read_attention
from moejax.layers.moe import moe
from moejax.layers.norm import normalize
from moejax.layers.parallel import ALONE, Parallel
from moejax.models.config import Cycle, DecoderConfig
from moejax.models.params import DecoderParams as DecoderParams
from moejax.models.params import LayerParams as LayerParams
from moejax.models.params import init_cache as init_cache
from moejax.models.params import init_decoder as init_decoder


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


def forward(
    params: DecoderParams,
    tokens: jax.Array,
    cfg: DecoderConfig,
    *,
    cache: KVCache | None = None,
    mask: jax.Array | None = None,
    forced_idx: jax.Array | None = None,
    logits_at: jax.Array | None = None,
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
        logits_at: int32 [B], the one position of each row whose logits are wanted: S is 1 in them.
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
    late = jnp.zeros_like(x) if any(layer.shortcut for layer in cfg.layers) else None
    call = _Call(cfg, positions, flat_mask, stage, parallel, cache is not None)
    carry = (x, k, v, stage_state, late)
    groups = zip(cfg.groups, params.groups, strict=True)
    carry, traces = _run_groups(call, carry, groups, (0, 0), forced_idx)
    (x, k, v, stage_state, _), (metrics, record) = carry, traces
    if cache is not None:
        assert k is not None and v is not None
        taken = jnp.full((batch,), length) if mask is None else mask.sum(1)
        cache = KVCache(k=k, v=v, length=start + taken.astype(jnp.int32))
    if logits_at is not None:
        x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
    return Output(
        logits=unembed(outer, x, cfg),
        cache=cache,
        stage_state=stage_state,
        metrics=metrics,
        record=record,
    )


class _Call(NamedTuple):
    """What is the same for all layers."""

    cfg: DecoderConfig
    positions: jax.Array
    flat_mask: jax.Array | None
    stage: Stage
    parallel: Parallel
    cached: bool


def _run_groups(
    call: _Call, carry: Any, groups: Iterable, first: tuple, forced_idx: jax.Array | None
) -> tuple[Any, Any]:
    """Runs groups in order, the first layer being `first` (among all, among MoE layers).

    Returns the carry and the traces of the MoE layers, stacked, or None without any.
    """
    (layer, moe_layer), traces, seen = first, [], 0
    for group, layers in groups:
        moe_layers = sum(one.moe is not None for one in group.layers)
        forced = None if forced_idx is None else forced_idx[seen : seen + moe_layers]
        run = _run_cycle if isinstance(group, Cycle) else _run_equal
        carry, trace = run(call, carry, group, layers, (layer, moe_layer + seen), forced)
        layer, seen = layer + len(group.layers), seen + moe_layers
        if moe_layers:
            traces.append(trace)
    return carry, jax.tree.map(lambda *t: jnp.concatenate(t), *traces) if traces else None


def _run_equal(call, carry, group, layers, first, forced_idx):
    """One scan over equal layers."""
    index = jnp.arange(group.num_layers, dtype=jnp.int32)
    forced_idx = forced_idx if group.moe else None
    steps = (layers, first[0] + index, first[1] + index, forced_idx)
    body = partial(_layer, call=call, group=group)
    return _scan(call, body, carry, steps, innermost=True)


def _scan(call, body, carry, steps, *, innermost):
    """`lax.scan` over (weights, *rest), which with a cache reads weights as decoding wants it.

    Without a cache there may be gradients, which a scan gathers step by step. Weights are those of
    single layers in the `innermost` scan, of a repeat of several layers in the one around it.
    """
    if not call.cached:
        return jax.lax.scan(body, carry, steps)
    weights, *rest = steps

    def read(carry, step):
        index, *rest = step
        return body(carry, (_read(weights, index, innermost), *rest))

    (length,) = {leaf.shape[0] for leaf in jax.tree.leaves(weights)}
    return jax.lax.scan(read, carry, (jnp.arange(length, dtype=jnp.int32), *rest))


def _read(weights, index, innermost):
    """What lies at `index` of stacks of weights."""

    def read(node):
        if isinstance(node, AttentionParams):
            return read_attention(node, index)
        return read_layer(node, index)

    whole = (lambda node: isinstance(node, AttentionParams)) if innermost else None
    return jax.tree.map(read, weights, is_leaf=whole)


def _run_cycle(call, carry, cycle, layers, first, forced_idx):
    """One scan over the repeats of a cycle."""
    repeats = cycle.repeats
    per_repeat = len(cycle.layers) // repeats
    moe_per_repeat = sum(one.moe is not None for one in cycle.layers) // repeats
    if forced_idx is not None:
        forced_idx = forced_idx.reshape(repeats, moe_per_repeat, *forced_idx.shape[1:])

    def once(carry, step):
        params, repeat, forced = step
        at = (first[0] + repeat * per_repeat, first[1] + repeat * moe_per_repeat)
        return _run_groups(call, carry, zip(cycle.groups, params, strict=True), at, forced)

    steps = (layers, jnp.arange(repeats, dtype=jnp.int32), forced_idx)
    carry, traces = _scan(call, once, carry, steps, innermost=False)
    return carry, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), traces)


def unembed(params: DecoderParams, x: jax.Array, cfg: DecoderConfig) -> jax.Array:
    """float32 logits [B, S, V] of the last hidden states [B, S, D]."""
    with jax.named_scope("unembed"):
        x = normalize(x, params.final_norm, cfg.norm_eps)
        w_out = params.embed.T if params.w_out is None else params.w_out
        logits = jnp.einsum("bsd,dv->bsv", x, w_out, preferred_element_type=jnp.float32)
        if params.b_out is not None:
            logits = logits + params.b_out.astype(jnp.float32)[None, None]
        return logits if cfg.logit_scale == 1.0 else logits * cfg.logit_scale


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


def _layer(carry, step, *, call, group):
    x, cache_k, cache_v, stage_state, late = carry
    params, layer, moe_layer, forced_idx = step
    cfg, parallel = call.cfg, call.parallel
    batch, length, d = x.shape
    params = parallel.unshard(params)
    h = parallel.split(normalize(x, params.attention_norm, cfg.norm_eps))
    attention = group.attention or cfg.attention
    if cache_k is None:
        mixed = self_attention(params.attention, h, call.positions, attention)
    else:
        mixed, cache_k, cache_v = cached_attention(
            params.attention, h, call.positions, cache_k, cache_v, layer, attention
        )
    x = x + _scaled(_with_bias(parallel.merge(mixed), params.attention), cfg)
    h = normalize(x, params.mlp_norm, cfg.norm_eps).reshape(batch * length, d)
    trace = None
    if group.moe is None:
        y = parallel.merge(gated_mlp(params.mlp, parallel.split(h)))
    else:
        y, stage_state, trace = _moe(
            params.mlp, h, group.moe, call, forced_idx, stage_state, moe_layer
        )
    y = y.reshape(batch, length, d)
    if group.shortcut:
        late, y = y, parallel.merge(gated_mlp(params.dense, parallel.split(h))).reshape(x.shape)
    x = x + _scaled(y, cfg)
    if late is not None and not group.shortcut:
        x, late = x + _scaled(late, cfg), jnp.zeros_like(late)
    return (x, cache_k, cache_v, stage_state, late), trace


def _moe(params, h, cfg, call, forced_idx, stage_state, moe_layer):
    """The MoE layer on h [T, D], and what is recorded of it."""
    y, routing, stage_state, metrics = moe(
        params,
        h,
        cfg,
        mask=call.flat_mask,
        forced_idx=forced_idx,
        stage=call.stage,
        stage_state=stage_state,
        layer=moe_layer,
        parallel=call.parallel,
    )
    record = Record(
        hidden=h,
        topk_idx=routing.topk_idx,
        topk_weights=routing.topk_weights,
        router_logits=routing.router_logits,
    )
    return y, stage_state, (metrics, record)


def _with_bias(mixed, params):
    """The output of attention with its bias, which the ranks of a model axis add once."""
    if not isinstance(params, AttentionParams) or params.b_o is None:
        return mixed
    return mixed + params.b_o[None, None]


def _scaled(branch, cfg):
    return branch if cfg.residual_scale == 1.0 else branch * cfg.residual_scale
