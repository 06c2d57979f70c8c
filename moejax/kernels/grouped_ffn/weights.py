"""Weights and activations of a stack of gated MLPs.

Axis letters:
    R  rows of the weight stack: experts, slots of a device cache, or layers * experts
    D  model dim      F  expert hidden dim
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import InputError, check

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
Hidden = Callable[[jax.Array, jax.Array], jax.Array]


def _clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """gpt-oss (arXiv 2508.10925, section 2.1): clamped at 7, `sigmoid(1.702 x)`, up plus one."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1.0) * gate * jax.nn.sigmoid(1.702 * gate)


_HIDDEN: dict[str, Hidden] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "clamped_swiglu": _clamped_swiglu,
}


@struct.dataclass(kw_only=True)
class GatedWeights:
    """`hidden(x @ w_gate + b_gate, x @ w_up + b_up) @ w_down + b_down` for every row of the stack.

    Matrices may be `kernels.quantized.Quantized` in place of arrays. Biases are all there or all
    None. `activation` names `hidden`: the weights know what they were trained for, so that every
    way of serving them agrees.
    """

    w_gate: jax.Array  # [R, D, F]
    w_up: jax.Array  # [R, D, F]
    w_down: jax.Array  # [R, F, D]
    b_gate: jax.Array | None = None  # [R, F]
    b_up: jax.Array | None = None  # [R, F]
    b_down: jax.Array | None = None  # [R, D]
    activation: str = struct.field(pytree_node=False, default="silu")


def hidden_fn(name: str) -> Hidden:
    """(gate, up) -> hidden, of the activation called `name`; `InputError` for an unknown one."""
    if name not in _HIDDEN:
        raise InputError(f"activation={name!r}, expected one of {sorted(_HIDDEN)}")
    return _HIDDEN[name]


def check_shapes(
    xs: jax.Array, weights: GatedWeights, group_sizes: jax.Array, group_rows: jax.Array | None
) -> None:
    """Raises `InputError` unless the operands of a grouped gated MLP fit together."""
    check(xs.ndim == 2, f"xs has shape {xs.shape}, expected [M, D]")
    check(weights.w_gate.ndim == 3, f"w_gate has shape {weights.w_gate.shape}, expected [R, D, F]")
    rows, d_model, d_ff = weights.w_gate.shape
    check(xs.shape[1] == d_model, f"xs has shape {xs.shape}, w_gate wants D={d_model}")
    for name, want in (("w_up", (rows, d_model, d_ff)), ("w_down", (rows, d_ff, d_model))):
        got = getattr(weights, name).shape
        check(got == want, f"{name} has shape {got}, expected {want}")
    biases = {name: getattr(weights, name) for name in ("b_gate", "b_up", "b_down")}
    present = [name for name, bias in biases.items() if bias is not None]
    check(len(present) in (0, 3), f"a gated MLP has all biases or none, got {present}")
    for name, width in (("b_gate", d_ff), ("b_up", d_ff), ("b_down", d_model)):
        if biases[name] is not None:
            got = biases[name].shape
            check(got == (rows, width), f"{name} has shape {got}, expected {(rows, width)}")
    check(group_sizes.ndim == 1, f"group_sizes has shape {group_sizes.shape}, expected [G]")
    for name, ids in (("group_sizes", group_sizes), ("group_rows", group_rows)):
        if ids is not None:
            check(jnp.issubdtype(ids.dtype, jnp.integer), f"{name} is {ids.dtype}, expected int32")
    if group_rows is None:
        check(
            group_sizes.shape == (rows,),
            f"group_sizes has shape {group_sizes.shape}, expected ({rows},) without group_rows",
        )
    else:
        check(
            group_rows.shape == group_sizes.shape,
            f"group_rows has shape {group_rows.shape}, group_sizes has {group_sizes.shape}",
        )
