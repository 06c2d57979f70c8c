"""Rows of stacks and windows of rows inside compiled loops: what every blocked kernel is made of.

Axis letters:
    M  rows      D  width of a row      R  rows of a weight stack      A, B  dims of a weight
"""

import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.quantized import Matrix, Quantized, dequantize


def window(rows: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """`rows[start : start + size]` of [M, D] for a traced `start`."""
    return lax.dynamic_slice_in_dim(rows, start, size, 0)


def put(rows: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
    """`rows` with `update` written from row `start` on, in place inside a loop."""
    return lax.dynamic_update_slice_in_dim(rows, update, start, 0)


def pad_rows(rows: jax.Array, size: int) -> jax.Array:
    """`rows` [M, D] with zero rows appended to `size` rows."""
    missing = size - rows.shape[0]
    return rows if missing == 0 else jnp.pad(rows, ((0, missing), (0, 0)))


def to_bits(array: jax.Array) -> jax.Array:
    """bfloat16 as uint16 of the same bits, anything else as it is.

    XLA:CPU has no bfloat16 update: it converts the whole target to float32 and back for each one.
    What a loop writes to is therefore carried as bits.
    """
    return lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array


def from_bits(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Undoes `to_bits`."""
    return lax.bitcast_convert_type(bits, dtype) if bits.dtype != dtype else bits


def widen(bits: jax.Array) -> jax.Array:
    """float32 of float32, or of the bits of bfloat16 (uint16)."""
    if bits.dtype == jnp.float32:
        return bits
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def read_row(stack: Matrix, row: jax.Array) -> jax.Array:
    """`stack[row]` [A, B] in float32, of a stack [R, A, B] of float32, bfloat16 or its bits.

    Of a quantised stack the row alone is dequantised.

    XLA:CPU has no bfloat16 slice: it converts the whole stack to float32 and hoists that out of
    the enclosing loop, 40 times slower at one token. Hence the bits are read as integers, and the
    barrier ties the stack to `row`, which the loop changes, so that nothing of it is hoisted.
    """
    if isinstance(stack, Quantized):
        return dequantize(jax.tree.map(lambda leaf: read_part(leaf, row), stack))
    if stack.dtype == jnp.float32:
        return read_part(stack, row)
    if stack.dtype == jnp.bfloat16:
        stack, row = lax.optimization_barrier((stack, row))
    return widen(read_part(to_bits(stack), row))


def read_part(stack: jax.Array, row: jax.Array) -> jax.Array:
    """`stack[row]` for a traced `row`, in the dtype of the stack."""
    return lax.dynamic_index_in_dim(stack, row, 0, keepdims=False)


def read_layer(stack: jax.Array, row: jax.Array) -> jax.Array:
    """`read_part`, on CPU of bfloat16 by its bits and behind a barrier, as `read_row` explains."""
    if stack.dtype != jnp.bfloat16:
        return read_part(stack, row)

    def by_bits(stack, row):
        stack, row = lax.optimization_barrier((stack, row))
        return from_bits(read_part(to_bits(stack), row), jnp.dtype(jnp.bfloat16))

    return lax.platform_dependent(stack, row, cpu=by_bits, default=read_part)


def refuse_dtypes(**arrays: Matrix) -> None:
    """Raises `NotImplementedError` unless every named array is float32 or bfloat16."""
    for name, array in arrays.items():
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"{name} is {array.dtype}, not float32 or bfloat16")


def dot_nt(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b.T`"""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())))


def dot_tn(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a.T @ b`"""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))
