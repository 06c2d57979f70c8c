"""Gated experts: initial weights, the dense evaluation of one, and of all (the oracle).

Axis letters:
    T  tokens    D  model dim    F  expert hidden dim    E  experts    K  experts per token
"""

import jax
import jax.numpy as jnp

from moejax.core.structs import Routing
from moejax.kernels.grouped_ffn import GatedWeights, hidden_fn
from moejax.kernels.quantized import dequantize_tree


def init_experts(
    key: jax.Array,
    shape: tuple[int, ...],
    d_model: int,
    d_ff: int,
    *,
    out_scale: float,
    dtype: jnp.dtype,
    bias: bool = False,
    activation: str = "silu",
) -> GatedWeights:
    """Normal weights of variance 1 / fan-in with leading axes `shape` (`(E,)`, or `()` for one).

    Biases, where wanted, are zero.
    """
    widths = dict(b_gate=d_ff, b_up=d_ff, b_down=d_model) if bias else {}

    def normal(name: int, tail: tuple[int, int], std: float) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, name), (*shape, *tail))
        return (noise * std).astype(dtype)

    return GatedWeights(
        w_gate=normal(0, (d_model, d_ff), d_model**-0.5),
        w_up=normal(1, (d_model, d_ff), d_model**-0.5),
        w_down=normal(2, (d_ff, d_model), out_scale * d_ff**-0.5),
        **{name: jnp.zeros((*shape, width), dtype) for name, width in widths.items()},
        activation=activation,
    )


def gated_mlp(weights: GatedWeights, x: jax.Array) -> jax.Array:
    """`hidden(x w_gate, x w_up) w_down` of one expert (no leading axis) on x [..., D].

    Quantised matrices are rounded to the dtype of x.
    """
    weights = dequantize_tree(weights, x.dtype)
    gate = _biased(x @ weights.w_gate, weights.b_gate)
    up = _biased(x @ weights.w_up, weights.b_up)
    hidden = hidden_fn(weights.activation)(gate, up)
    return _biased(hidden @ weights.w_down, weights.b_down)


def _biased(x, bias):
    return x if bias is None else x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def every_expert(weights: GatedWeights, x: jax.Array, routing: Routing) -> jax.Array:
    """[T, K, D] outputs of the chosen experts, by evaluating all E of them on all rows.

    The reference for every dispatch and offload path. A padded token's rows are zero.
    Cost: E / K times the useful work.
    """
    outputs = jax.vmap(gated_mlp, (0, None), 1)(weights, x)  # [T, E, D]
    rows = jnp.arange(x.shape[0])[:, None]
    return outputs.at[rows, routing.topk_idx].get(mode="fill", fill_value=0)
