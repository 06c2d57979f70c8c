"""The net inside the learned predictors: a linear map plus a silu MLP, one per target layer.

Axis letters:
    L  MoE layers    T  tokens    I  inputs    H  hidden units    E  experts
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct

Tree = TypeVar("Tree")


@struct.dataclass(kw_only=True)
class MLPParams:
    """Leading axis [L - 1] in parameters of a predictor, none after `select`."""

    w_linear: jax.Array  # [I, E]
    w_in: jax.Array  # [I, H]
    b_in: jax.Array  # [H]
    w_out: jax.Array  # [H, E]
    b_out: jax.Array  # [E]


def init_mlp(key: jax.Array, targets: int, inputs: int, hidden: int, outputs: int) -> MLPParams:
    """Nets for `targets` layers whose output is zero, so that fitting starts from the base."""
    w_in = jax.random.normal(key, (targets, inputs, hidden)) * inputs**-0.5
    return MLPParams(
        w_linear=jnp.zeros((targets, inputs, outputs)),
        w_in=w_in,
        b_in=jnp.zeros((targets, hidden)),
        w_out=jnp.zeros((targets, hidden, outputs)),
        b_out=jnp.zeros((targets, outputs)),
    )


def mlp(params: MLPParams, x: jax.Array) -> jax.Array:
    """float32 [T, E] of x float32 [T, I]; parameters of one layer."""
    hidden = jax.nn.silu(x @ params.w_in + params.b_in[None])
    return x @ params.w_linear + hidden @ params.w_out + params.b_out[None]


def select(params: Tree, layer: jax.Array | int) -> Tree:
    """Entry `layer` (may be traced) of every stacked leaf; past the end it is the last entry."""
    return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, layer, keepdims=False), params)
