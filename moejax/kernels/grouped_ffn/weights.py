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

Activation = Literal["silu", "gelu_tanh"]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda gate: jax.nn.gelu(gate, approximate=True),
}


@struct.dataclass(kw_only=True)
class GatedWeights:
    """`(act(x @ w_gate) * (x @ w_up)) @ w_down` for every row of the stack."""

    w_gate: jax.Array  # [R, D, F]
    w_up: jax.Array  # [R, D, F]
    w_down: jax.Array  # [R, F, D]


def activation_fn(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation called `name`; raises `InputError` for an unknown one."""
    if name not in _ACTIVATIONS:
        raise InputError(f"activation={name!r}, expected one of {sorted(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


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
