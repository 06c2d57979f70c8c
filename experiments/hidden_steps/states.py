"""What a predictor may read of a model: the states before attention and before each gate.

`moejax.models.decoder.forward` records what enters a gate; what enters a layer's attention is of
use to offline studies only, so it is recorded here, layer by layer.

Axis letters:
    L  MoE layers    N  windows    S  tokens of a window    T  N * S    D  model dim
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moejax.core.errors import check
from moejax.layers.attention import self_attention
from moejax.layers.moe import MoEConfig, moe
from moejax.layers.norm import normalize
from moejax.models.config import DecoderConfig, LayerGroup
from moejax.models.decoder import DecoderParams
from moejax.predictors.recording import Recording
from moejax.training.progress import Update


@struct.dataclass(kw_only=True)
class States:
    """Of every MoE layer, leading axis L."""

    pre_attention: jax.Array  # [L, T, D]
    hidden: jax.Array  # [L, T, D]
    topk_idx: jax.Array  # int32 [L, T, K]
    topk_weights: jax.Array  # float32 [L, T, K]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """One side of a corpus."""

    routing: Recording
    entering: np.ndarray  # [L, N, S, D] states that enter attention
    domains: np.ndarray  # [N] names


def check_equal_layers(cfg: DecoderConfig) -> tuple[LayerGroup, MoEConfig]:
    """The group of a decoder whose layers are all equal MoE layers, and those; or `InputError`."""
    (group, *others) = cfg.groups
    plain = isinstance(group, LayerGroup) and group.moe is not None and not group.shortcut
    check(plain and not others, "recording wants a decoder of equal MoE layers, one group of them")
    assert isinstance(group, LayerGroup) and group.moe is not None
    return group, group.moe


@partial(jax.jit, static_argnames="cfg")
def states(params: DecoderParams, tokens: jax.Array, cfg: DecoderConfig) -> States:
    """The states of tokens int32 [N, S], the same that `forward` has."""
    group, kind = check_equal_layers(cfg)
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    x = params.embed[tokens] * jnp.asarray(cfg.embed_scale, cfg.jnp_dtype)

    def layer(x, params):
        entering = normalize(x, params.attention_norm, cfg.norm_eps)
        attention = group.attention or cfg.attention
        x = x + cfg.residual_scale * self_attention(
            params.attention, entering, positions, attention
        )
        h = normalize(x, params.mlp_norm, cfg.norm_eps).reshape(batch * length, -1)
        y, routing, _, _ = moe(params.mlp, h, kind)
        record = States(
            pre_attention=entering.reshape(h.shape),
            hidden=h,
            topk_idx=routing.topk_idx,
            topk_weights=routing.topk_weights,
        )
        return x + cfg.residual_scale * y.reshape(x.shape), record

    return jax.lax.scan(layer, x, params.groups[0])[1]


def record(
    params: DecoderParams, cfg: DecoderConfig, windows: np.ndarray, batch: int, update: Update
) -> tuple[Recording, np.ndarray]:
    """The routing of windows int32 [N, S] with gate inputs, and the states before attention.

    Memory: 2 * L * N * S * D words.
    """
    count, length = windows.shape
    parts: dict[str, list[np.ndarray]] = {}
    for first in range(0, count, batch):
        rows = np.minimum(np.arange(first, first + batch), count - 1)
        kept = min(batch, count - first)
        found = states(params, windows[rows], cfg)
        for name, value in found.__dict__.items():
            value = np.asarray(value).reshape(len(value), batch, length, -1)
            parts.setdefault(name, []).append(value[:, :kept])
        update((first + kept) / count, f"{(first + kept) * length:,} tokens")
    whole = {name: np.concatenate(each, axis=1) for name, each in parts.items()}
    entering = whole.pop("pre_attention")
    return Recording(tokens=windows, **whole), entering
