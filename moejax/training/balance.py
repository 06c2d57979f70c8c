"""Balance without a loss: correction biases follow the load of their experts.

After every step the bias of an expert with more than the mean load falls by a fixed amount, that of
one with less rises (arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
The bias counts in the choice of experts only, so it has no gradient and disturbs none.

Axis letters:
    L  layers of a group, Lm MoE layers of the model    E  experts
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.layers.moe import MoEParams
from moejax.models.decoder import DecoderParams, LayerParams


def balance_routers(params: DecoderParams, load: jax.Array, rate: float) -> DecoderParams:
    """The weights with correction biases moved by `rate` towards an even load.

    Args:
        load: assignments of the step, int32 [Lm, E], those of all ranks.

    Routers without a correction bias stay as they are. For groups of equal layers, not cycles.
    """
    groups, first = [], 0
    for group in params.groups:
        if isinstance(group, LayerParams) and isinstance(group.mlp, MoEParams):
            last = first + group.mlp.router.w_router.shape[0]
            group = dataclasses.replace(
                group, mlp=_balanced_layers(group.mlp, load[first:last], rate)
            )
            first = last
        groups.append(group)
    return dataclasses.replace(params, groups=tuple(groups))


def _balanced_layers(mlp: MoEParams, load: jax.Array, rate: float) -> MoEParams:
    if mlp.router.correction_bias is None:
        return mlp
    bias = balanced(mlp.router.correction_bias, load, rate)
    return dataclasses.replace(mlp, router=dataclasses.replace(mlp.router, correction_bias=bias))


def balanced(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """float32 [L, E]: bias + rate * sign(mean load - load)."""
    load = load.astype(jnp.float32)
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
