"""Grouped-query attention (arXiv 2305.13245) and what open models add to it.

Biases, normalised queries and keys, windows, sinks and temperatures are parts that a config names
and a layer without them does not have: their weights are None, their code is not traced.

Axis letters:
    B  batch       S  new positions    C  positions of the cache
    H  heads       Hkv  KV heads       Dh  head dim        D  model dim
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.kernels.in_stack import InStack, linear
from moejax.kernels.rows import read_layer
from moejax.layers.norm import rms_norm, unit_norm
from moejax.layers.rope import RopeConfig, rotate

QKNorm = Literal["none", "head", "width", "unit"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Static description of one attention layer.

    Attributes:
        rope: rotation of queries and keys, None for none.
        bias: of queries, keys and values (`qkv`), or of the output too (`all`).
        qk_norm: queries and keys at unit root mean square: every head alone (`head`, Qwen3), all
            heads as one vector (`width`, OLMoE), or after the rotation and without a weight
            (`unit`, Llama 4).
        norm_eps: of that norm.
        scale: of the scores, None for `head_dim ** -0.5`.
        window: a query sees so many positions, its own among them; 0 for all.
        chunk: a query sees the positions of its own chunk of that many; 0 for all (Llama 4).
        sinks: a learned score per head takes part in the softmax and carries no value (gpt-oss).
        temperature: (floor, slope), queries at position p are scaled by
            `1 + slope * log(1 + (p + 1) // floor)` (Llama 4; arXiv 2501.19399).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig | None = RopeConfig()
    bias: Literal["none", "qkv", "all"] = "none"
    qk_norm: QKNorm = "none"
    norm_eps: float = 1e-6
    scale: float | None = None
    window: int = 0
    chunk: int = 0
    sinks: bool = False
    temperature: tuple[float, float] | None = None

    def __post_init__(self):
        h, kv = self.num_heads, self.num_kv_heads
        check(h >= 1 and kv >= 1, f"num_heads={h} and num_kv_heads={kv} must be at least 1")
        check(h % kv == 0, f"num_heads={h} is not divisible by num_kv_heads={kv}")
        dim = self.head_dim
        check(dim >= 2 and dim % 2 == 0, f"head_dim={dim} must be positive and even for rope")
        if self.rope:
            self.rope.check_fits(dim)
        for name, known in (
            ("bias", ("none", "qkv", "all")),
            ("qk_norm", ("none", "head", "width", "unit")),
        ):
            value = getattr(self, name)
            check(value in known, f"attention {name}={value!r} is not one of {known}")
        for name in ("window", "chunk"):
            check(getattr(self, name) >= 0, f"attention {name}={getattr(self, name)} is negative")

    @property
    def cache_dims(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, dims) of what a position keeps as its key and its value."""
        kept = (self.num_kv_heads, self.head_dim)
        return kept, kept


@struct.dataclass(kw_only=True)
class AttentionParams:
    """Weights of one attention layer; None where the config does not ask for them."""

    w_q: jax.Array | InStack  # [D, H, Dh]
    w_k: jax.Array | InStack  # [D, Hkv, Dh]
    w_v: jax.Array | InStack  # [D, Hkv, Dh]
    w_o: jax.Array | InStack  # [H, Dh, D]
    b_q: jax.Array | None = None  # [H, Dh]
    b_k: jax.Array | None = None  # [Hkv, Dh]
    b_v: jax.Array | None = None  # [Hkv, Dh]
    b_o: jax.Array | None = None  # [D]
    q_norm: jax.Array | None = None  # [Dh], or [H, Dh] of width
    k_norm: jax.Array | None = None  # [Dh], or [Hkv, Dh] of width
    sinks: jax.Array | None = None  # [H]


def init_attention(
    key: jax.Array, d_model: int, cfg: AttentionConfig, *, out_scale: float, dtype: jnp.dtype
) -> AttentionParams:
    """Normal weights of variance 1 / fan-in, zero biases; `out_scale` shrinks the residual."""
    h, kv, dh = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

    def normal(name: int, shape: tuple[int, ...], std: float) -> jax.Array:
        return (jax.random.normal(jax.random.fold_in(key, name), shape) * std).astype(dtype)

    extras = {}
    if cfg.bias != "none":
        for name, heads in (("b_q", h), ("b_k", kv), ("b_v", kv)):
            extras[name] = jnp.zeros((heads, dh), dtype)
    if cfg.bias == "all":
        extras["b_o"] = jnp.zeros((d_model,), dtype)
    if cfg.qk_norm in ("head", "width"):
        for name, heads in (("q_norm", h), ("k_norm", kv)):
            extras[name] = jnp.ones((dh,) if cfg.qk_norm == "head" else (heads, dh), dtype)
    if cfg.sinks:
        extras["sinks"] = jnp.zeros((h,), dtype)
    return AttentionParams(
        w_q=normal(0, (d_model, h, dh), d_model**-0.5),
        w_k=normal(1, (d_model, kv, dh), d_model**-0.5),
        w_v=normal(2, (d_model, kv, dh), d_model**-0.5),
        w_o=normal(3, (h, dh, d_model), out_scale * (h * dh) ** -0.5),
        **extras,
    )


def read_attention(stacked: AttentionParams, layer: jax.Array) -> AttentionParams:
    """The weights of one layer of a stack of them, the matrices left where they are."""
    read = jax.tree.map(lambda leaf: read_layer(leaf, layer), stacked)
    left = ("w_q", "w_k", "w_v", "w_o")
    matrices = {name: InStack(stack=getattr(stacked, name), row=layer) for name in left}
    return dataclasses.replace(read, **matrices)


def project(
    params: AttentionParams, x: jax.Array, positions: jax.Array, cfg: AttentionConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries [B, S, H, Dh], rotated keys and values [B, S, Hkv, Dh] of x [B, S, D]."""
    q = _biased(linear(x, params.w_q), params.b_q)
    k = _biased(linear(x, params.w_k), params.b_k)
    v = _biased(linear(x, params.w_v), params.b_v)
    if params.q_norm is not None and params.k_norm is not None:
        q, k = _normed(q, params.q_norm, cfg.norm_eps), _normed(k, params.k_norm, cfg.norm_eps)
    q, k = rotate(q, positions, cfg.rope), rotate(k, positions, cfg.rope)
    if cfg.qk_norm == "unit":
        q, k = unit_norm(q, cfg.norm_eps), unit_norm(k, cfg.norm_eps)
    if cfg.temperature is not None:
        floor, slope = cfg.temperature
        steps = jnp.floor((positions.astype(jnp.float32) + 1.0) / floor)
        scale = 1.0 + slope * jnp.log1p(steps)
        q = (q.astype(jnp.float32) * scale[:, :, None, None]).astype(q.dtype)
    return q, k, v


def attend(
    params: AttentionParams,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    cfg: AttentionConfig,
) -> jax.Array:
    """Softmax attention and output projection, without the output's bias.

    Args:
        q: [B, S, H, Dh]; k, v: [B, C, Hkv, Dh]; visible: bool [B or 1, S, C].

    Returns: [B, S, D]. Scores and softmax are float32.
    """
    batch, length, heads, dim = q.shape
    scale = dim**-0.5 if cfg.scale is None else cfg.scale
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    scores = jnp.einsum("bsgqe,bcge->bgqsc", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * scale, -1e30)
    probs = _softmax(scores, params.sinks).astype(v.dtype)
    # In this order of dims XLA:CPU moves rows of the values; for "bsgqe" it would transpose them.
    mixed = jnp.einsum("bgqsc,bcge->bgqse", probs, v).transpose(0, 3, 1, 2, 4)
    return linear(mixed.reshape(batch, length, heads, dim), params.w_o, 2)


def _softmax(scores, sinks):
    """Over the positions of scores [B, Hkv, H / Hkv, S, C], and a sink [H] beside them."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    _, groups, queries, _, _ = scores.shape
    sink = sinks.astype(jnp.float32).reshape(1, groups, queries, 1, 1)
    largest = jnp.maximum(scores.max(-1, keepdims=True), sink)
    share = jnp.exp(scores - largest)
    return share / (share.sum(-1, keepdims=True) + jnp.exp(sink - largest))


def _biased(x, bias):
    return x if bias is None else x + bias[None, None]


def _normed(x, weight, eps):
    """x [B, S, H, Dh] normalised over a head's dims, or over all heads' for a weight [H, Dh]."""
    if weight.ndim == 1:
        return rms_norm(x, weight, eps)
    return rms_norm(x.reshape(*x.shape[:2], -1), weight.reshape(-1), eps).reshape(x.shape)
