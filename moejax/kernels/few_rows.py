"""Few rows times one matrix of a stack, read in place: the decode path on CPU.

XLA:CPU cannot give a dot a slice of a stack: it copies the matrix out first, twice the traffic of a
step that does nothing but read weights. Written as sums of scaled rows, the slices fuse into one
loop that runs over whole matrix rows, in parallel, and no copy is made: 2.5 times faster at one
row. The last sum must be a dot: a reduction would be handed to a library together with the slices,
which are then copied again.

Axis letters:
    M  rows      R  matrices of the stack      A, B  dims of a matrix      J  matrix rows per sum
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.quantized import Matrix, Quantized, decode, values_per_word
from moejax.kernels.rows import read_part, read_row, to_bits, widen

# From this many rows the copy pays for itself; measured, docs/kernels.md.
_MAX_ROWS = 3
# Terms of one sum: 16 make XLA:CPU convert a bfloat16 stack as a whole, 4 are slower.
_TERMS = 8


def matmul_row(x: jax.Array, stack: Matrix, row: jax.Array) -> jax.Array:
    """`x @ stack[row]` in float32: [M, A] float32 and [R, A, B] -> [M, B].

    The stack is float32, bfloat16 or its bits, or quantised. Forward only. The way of summing
    depends on shapes, format and platform alone, so equal rows give equal bits wherever the matrix
    lies.
    """

    def general(x, stack, row):
        return x @ read_row(stack, row)

    if x.shape[0] > _MAX_ROWS:
        return general(x, stack, row)
    if isinstance(stack, Quantized):
        return lax.platform_dependent(x, stack, row, cpu=_scaled_words, default=general)
    if stack.shape[1] % _TERMS:
        return general(x, stack, row)
    return lax.platform_dependent(x, stack, row, cpu=_scaled_rows, default=general)


def _scaled_rows(x: jax.Array, stack: jax.Array, row: jax.Array) -> jax.Array:
    count, inner, outer = stack.shape
    if stack.dtype == jnp.bfloat16:
        stack, row = lax.optimization_barrier((stack, row))  # as in `read_row`
    blocks = to_bits(stack).reshape(count, inner // _TERMS, _TERMS, outer)
    rows = x.reshape(x.shape[0], inner // _TERMS, _TERMS)
    ones = jnp.ones((1, inner // _TERMS), jnp.float32)

    def term(m, j):
        size = (1, inner // _TERMS, 1, outer)
        matrix_rows = lax.dynamic_slice(blocks, (row, 0, j, 0), size)[0, :, 0]
        return rows[m, :, j, None] * widen(matrix_rows)  # [A // J, B]

    def product(m):
        return ones @ functools.reduce(jnp.add, [term(m, j) for j in range(_TERMS)])

    return jnp.concatenate([product(m) for m in range(x.shape[0])])


def _scaled_words(x: jax.Array, stack: Quantized, row: jax.Array) -> jax.Array:
    """Values that share words are the terms of a sum; a group's scale multiplies its sums once."""
    outer, parts = stack.q.shape[2], values_per_word(stack.format)
    scale = read_part(stack.scale, row).reshape(-1, 1, outer)  # [A / G, 1, B]
    groups = scale.shape[0]
    words = stack.q.reshape(stack.q.shape[0], groups, -1, outer)  # [R, A / G, G / P, B]
    height = words.shape[2]
    rows = x.reshape(x.shape[0], groups, parts, height)
    ones = jnp.ones((1, groups * height), jnp.float32)

    def term(m, p):
        size = (1, groups, height, outer)
        word_rows = lax.dynamic_slice(words, (row, 0, 0, 0), size)[0]
        return rows[m, :, p, :, None] * decode(word_rows, p, stack.format)  # [A / G, G / P, B]

    def product(m):
        total = functools.reduce(jnp.add, [term(m, p) for p in range(parts)])
        return ones @ (total * scale).reshape(groups * height, outer)

    return jnp.concatenate([product(m) for m in range(x.shape[0])])
