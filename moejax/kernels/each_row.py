"""Every row times a matrix of its own, all read in place from one stack: decode on CPU.

With a few tokens each expert has a row or two, and a loop of small products spends its time on
starting them. Here one fused loop reads the matrices of several rows: partial sums of some scaled
matrix rows each, then one loop that adds these up. A product of `few_rows` would do for the last
sum, but its bits depend on how many rows there are; sums that are written out do not.

Axis letters:
    N  rows      R  matrices of the stack      A, B  dims of a matrix
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.few_rows import matmul_row
from moejax.kernels.quantized import Matrix, Quantized
from moejax.kernels.rows import to_bits, widen

# Partial sums that one loop adds up: more make it slow to compile.
_ADDENDS = 64


def matmul_each(x: jax.Array, stack: Matrix, rows: jax.Array) -> jax.Array:
    """`x[n] @ stack[rows[n]]` in float32: [N, A] float32, [R, A, B], int32 [N] -> [N, B].

    An int32 [] names one matrix for all of x. The stack is float32, bfloat16 or its bits, or
    quantised. Forward only, for CPU. A row's bits do not depend on the other rows, nor on where its
    matrix lies.
    """
    if isinstance(stack, Quantized) or not _terms(stack):
        each = jnp.broadcast_to(rows, x.shape[:1])
        return jnp.concatenate([matmul_row(x[n, None], stack, each[n]) for n in range(x.shape[0])])
    terms, (count, inner, outer) = _terms(stack), stack.shape
    if stack.dtype == jnp.bfloat16:
        stack, rows = lax.optimization_barrier((stack, rows))  # as in `read_row`
    blocks = to_bits(stack).reshape(count, inner // terms, terms, outer)
    parts = x.reshape(x.shape[0], inner // terms, terms)

    def matrix_rows(j):
        if rows.ndim:
            return blocks[:, :, j].at[rows].get(mode="promise_in_bounds")  # [N, A // terms, B]
        size = (1, inner // terms, 1, outer)
        return lax.dynamic_slice(blocks, (rows, 0, j, 0), size)[:, :, 0]  # [1, A // terms, B]

    def term(j):
        return parts[:, :, j, None] * widen(matrix_rows(j))

    return _add_up(functools.reduce(jnp.add, [term(j) for j in range(terms)]))


def _terms(stack: jax.Array) -> int:
    """Terms of a partial sum; 0 where the matrix has no such number of rows.

    With 16 XLA:CPU converts a bfloat16 stack as a whole; in float32 they are a tenth faster than 8.
    """
    choices = (16, 8) if stack.dtype == jnp.float32 else (8,)
    return next((terms for terms in choices if stack.shape[1] % terms == 0), 0)


def _add_up(sums: jax.Array) -> jax.Array:
    """[N, P, B] -> [N, B], in an order that depends on P alone."""
    while sums.shape[1] > 1:
        count = sums.shape[1]
        size = max(d for d in range(1, min(count, _ADDENDS) + 1) if count % d == 0)
        size = count if size == 1 else size
        # Without a barrier the sums of rows would be computed once per addend.
        sums = lax.optimization_barrier(sums).reshape(sums.shape[0], count // size, size, -1)
        sums = functools.reduce(jnp.add, [sums[:, :, i] for i in range(size)])
    return sums[:, 0]
