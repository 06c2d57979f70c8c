"""Learned look-ahead: next-gate scores plus a small net on the current gate input.

`scale * next_gate(h) + linear(n) + MLP(n)`, n being h at unit root mean square. The net's output
layers start at zero and the scale at one, so an unfitted predictor *is* next-gate, and fitting
learns what one layer changes. (The idea of residual heads on the router's input: SpecPrefetch.)

Axis letters:
    L  MoE layers    T  tokens    D  model dim    H  hidden units    E  experts
"""

import jax
import jax.numpy as jnp
from flax import struct

from moejax.predictors import next_gate
from moejax.predictors.mlp import MLPParams, init_mlp, mlp, select
from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams


@struct.dataclass(kw_only=True)
class ResidualParams:
    """One net per target layer; the routers are the model's own and are passed beside it."""

    scale: jax.Array  # [L - 1]
    net: MLPParams  # inputs D


def init_residual(
    key: jax.Array, *, num_layers: int, d_model: int, num_experts: int, hidden: int
) -> ResidualParams:
    """Parameters that predict exactly what next-gate predicts."""
    targets = num_layers - 1
    net = init_mlp(key, targets, d_model, hidden, num_experts)
    return ResidualParams(scale=jnp.ones((targets,)), net=net)


def scores(
    params: ResidualParams,
    layer: jax.Array | int,
    hidden: jax.Array,
    routers: RouterParams,
    cfg: RouterConfig,
) -> jax.Array:
    """float32 [T, E] for target `layer + 1` from hidden [T, D]; `routers` has a leading [L].

    Cost: T * (2 * D * E + D * H + H * E) multiply-adds.
    """
    base = next_gate.scores(routers, layer, hidden, cfg)
    return one_layer(select(params, layer), hidden, base)


def one_layer(params: ResidualParams, hidden: jax.Array, base: jax.Array) -> jax.Array:
    """Scores from one layer's parameters, its gate input [T, D] and next-gate scores [T, E]."""
    x = hidden.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    return params.scale * base + mlp(params.net, x)
