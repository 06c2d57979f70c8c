"""A dense weight that is left in its stack of layers until it multiplies.

What a scan over layers slices from its weights XLA:CPU copies before a product reads it: half of a
decoded token's time at batch 1. With few rows `linear` reads the stack in place instead.

Axis letters:
    R  layers of the stack    A, B  dims of a weight, each one or several
"""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from moejax.kernels.each_row import matmul_each
from moejax.kernels.rows import read_layer

# With as many rows or more a copy costs no more than reading the weight once per row; measured.
_MAX_ROWS = 4


@struct.dataclass(kw_only=True)
class InStack:
    """`stack[row]`, unread."""

    stack: jax.Array  # [R, *A, *B]
    row: jax.Array  # int32 []


def linear(x: jax.Array, weight: jax.Array | InStack, inner: int = 1) -> jax.Array:
    """x [..., *A] times a weight [*A, *B], of which the first `inner` dims are A: [..., *B].

    The result has the dtype of x. One read of the weight per row of x on CPU up to 4 rows, else one
    in all, after a copy of what is in a stack. Forward only when in a stack.
    """
    if not isinstance(weight, InStack):
        return jnp.tensordot(x, weight, inner)
    rows = x.reshape(-1, math.prod(x.shape[x.ndim - inner :]))
    shape = weight.stack.shape[1 + inner :]

    def copied(rows, stack, row):
        return rows @ read_layer(stack, row).reshape(rows.shape[1], -1)

    def in_place(rows, stack, row):
        flat = stack.reshape(stack.shape[0], rows.shape[1], -1)
        return matmul_each(rows.astype(jnp.float32), flat, row).astype(rows.dtype)

    few = in_place if len(rows) <= _MAX_ROWS else copied
    y = lax.platform_dependent(rows, weight.stack, weight.row, cpu=few, default=copied)
    return y.reshape(*x.shape[: x.ndim - inner], *shape)
