"""Pre-attention predictor: a layer's experts from the state that enters its own attention.

Two linear maps and a ranking loss (arXiv 2511.10676): the fetch has all of the attention to hide
behind. A layer's own input is known exactly, so layer 0 is predicted too, and errors come from what
attention adds. The decoder's prefetch asks for the next layer, so it has no place for this one.

Axis letters:
    L  MoE layers    T  tokens    D  model dim    H  inner width    E  experts
"""

import jax
import jax.numpy as jnp
from flax import struct

from moejax.predictors.mlp import select


@struct.dataclass(kw_only=True)
class PreAttentionParams:
    """Leading axis [L] in parameters of a predictor, none after `select`."""

    w_in: jax.Array  # [D, H]
    w_out: jax.Array  # [H, E]
    b_out: jax.Array  # [E]


def init_pre_attention(
    key: jax.Array, *, num_layers: int, d_model: int, hidden: int, num_experts: int
) -> PreAttentionParams:
    """Maps that score every expert alike."""
    return PreAttentionParams(
        w_in=jax.random.normal(key, (num_layers, d_model, hidden)) * d_model**-0.5,
        w_out=jnp.zeros((num_layers, hidden, num_experts)),
        b_out=jnp.zeros((num_layers, num_experts)),
    )


def scores(
    params: PreAttentionParams, layer: jax.Array | int, pre_attention: jax.Array
) -> jax.Array:
    """float32 [T, E] for `layer` itself from its normalised input [T, D].

    Cost: T * (D * H + H * E) multiply-adds.
    """
    return one_layer(select(params, layer), pre_attention)


def one_layer(params: PreAttentionParams, pre_attention: jax.Array) -> jax.Array:
    """Scores from one layer's parameters."""
    x = pre_attention.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    return x @ params.w_in @ params.w_out + params.b_out[None]
