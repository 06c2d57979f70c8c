"""The grouped gated MLP row by row, for few rows on CPU: every row reads its expert in place.

Rows are taken 32 at a time, whatever their groups, then eight, then one; two rows of one expert
read it twice, the second time from the cache of the core, unless a block ends or another core
begins between them: hence large blocks.

Axis letters:
    M  rows      G  groups      R  rows of the weight stack      D  model dim      F  hidden dim
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.chunks import ChunkPlan
from moejax.kernels.each_row import matmul_each
from moejax.kernels.grouped_ffn.weights import GatedWeights, hidden_fn
from moejax.kernels.quantized import Matrix
from moejax.kernels.rows import put, read_part, to_bits, window
from moejax.kernels.vma import vary_together

# With more rows than that experts have several each, and products of chunks are faster.
MAX_ROWS = 64
_BLOCKS = (32, 8, 1)
Rows = tuple[jax.Array, ...]


def run_rows(
    out: Rows,
    xs: jax.Array,
    weights: GatedWeights,
    group_rows: jax.Array | None,
    plan: ChunkPlan,
    begin: jax.Array | int,
    end: jax.Array | int,
) -> Rows:
    """The rows of chunks `[begin, end)` of `plan`, into the bits of `out`.

    `out` is (y,) or (y, gate, up), [M or more, *]; `xs` is [M or more, D]. No row but those of the
    chunks is written.
    """
    hidden = hidden_fn(weights.activation)
    stack_row = plan.group_of_row if group_rows is None else group_rows[plan.group_of_row]
    first, last = _rows_before(plan, begin), _rows_before(plan, end)

    def enter(x: jax.Array, rows: jax.Array) -> Rows:
        gate = _product(x, weights.w_gate, weights.b_gate, rows)
        up = _product(x, weights.w_up, weights.b_up, rows)
        return (hidden(gate, up), gate, up)[: len(out)]

    def leave(x: jax.Array, rows: jax.Array) -> Rows:
        return (_product(x, weights.w_down, weights.b_down, rows),)

    # Two loops: in one, XLA would compute hidden rows again for every element of the last product.
    middle = jnp.zeros((xs.shape[0], weights.w_gate.shape[2]), jnp.float32)
    middle, _ = vary_together(middle, xs)
    middle, *kept = _each_block((middle, *out[1:]), xs, stack_row, first, last, enter)
    (y,) = _each_block(out[:1], middle, stack_row, first, last, leave)
    return (y, *kept)


def _each_block(
    out: Rows,
    xs: jax.Array,
    stack_row: jax.Array,
    first: jax.Array,
    last: jax.Array,
    fn: Callable[[jax.Array, jax.Array], Rows],
) -> Rows:
    """`fn` of rows [first, last) of `xs` and of their rows of the stack, written to `out`."""

    def block(size: int, begin: jax.Array):
        def body(i: jax.Array, out: Rows) -> Rows:
            start = begin + i * size
            rows = lax.dynamic_slice_in_dim(stack_row, start, size)
            # Where one block takes all rows XLA would read their matrices before the loop.
            rows, start = lax.optimization_barrier((rows, start))
            new = fn(window(xs, start, size).astype(jnp.float32), rows)
            return tuple(_put(o, r, start) for o, r in zip(out, new, strict=True))

        return body

    for size in sorted({min(size, stack_row.shape[0]) for size in _BLOCKS}, reverse=True):
        full = (last - first) // size
        out = lax.fori_loop(0, full, block(size, first), out)
        first = first + full * size
    return out


def _put(bits: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    dtype = jnp.bfloat16 if bits.dtype == jnp.uint16 else bits.dtype
    return put(bits, to_bits(rows.astype(dtype)), start)


def _product(x: jax.Array, stack: Matrix, biases: jax.Array | None, rows: jax.Array) -> jax.Array:
    y = matmul_each(x, stack, rows)
    if biases is None:
        return y
    return y + jax.vmap(lambda row: read_part(biases, row))(rows).astype(jnp.float32)


def _rows_before(plan: ChunkPlan, chunk: jax.Array | int) -> jax.Array:
    """int32 []: the first row of a chunk, the number of rows for the one after the last."""
    index = jnp.arange(plan.rows.shape[0], dtype=jnp.int32)
    return jnp.sum(jnp.where(index < chunk, plan.rows, 0), dtype=jnp.int32)
