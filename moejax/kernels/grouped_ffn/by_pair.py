"""The grouped gated MLP on chunks of one size two at a time, for many rows on CPU.

XLA:CPU hardly shares a product of 16 to 128 rows out to several cores, but a batch of two products
goes to two. Both are the same product bit for bit, so a chunk's rows do not depend on its partner.

Axis letters:
    M  rows      G  groups      R  rows of the weight stack      D  model dim      F  hidden dim
    S  size of the two chunks   C  chunks at most
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.chunks import ChunkPlan
from moejax.kernels.grouped_ffn.weights import GatedWeights, hidden_fn
from moejax.kernels.quantized import Matrix
from moejax.kernels.rows import put, read_part, read_row, to_bits, window

# Every size that is paired is one more loop to compile.
_PAIRED = (16, 32, 64, 128)
Bits = tuple[jax.Array, ...]
Picked = tuple[Callable[[jax.Array], jax.Array], jax.Array]


def run_pairs(
    out: Bits,
    xs: jax.Array,
    weights: GatedWeights,
    group_rows: jax.Array | None,
    plan: ChunkPlan,
    begin: jax.Array | int,
    end: jax.Array | int,
    *,
    sizes: tuple[int, ...],
    run_singles: Callable[[Bits, Callable[[jax.Array], jax.Array], jax.Array], Bits],
) -> Bits:
    """Chunks `[begin, end)` of `plan` into the bits of `out`: (y,) or (y, gate, up), [M + S, *].

    `run_singles(out, chunk_of, count)` computes chunks `chunk_of(0 .. count - 1)` one by one; it
    gets the chunks that find no partner of their size, in row order, and may spill behind them.
    """
    index = jnp.arange(plan.rows.shape[0], dtype=jnp.int32)
    single = inside = (index >= begin) & (index < end)
    pairs = []
    for size_class, size in enumerate(sizes):
        if size in _PAIRED:
            mine = inside & (plan.size_class == size_class)
            even = jnp.sum(mine, dtype=jnp.int32) // 2 * 2
            mine &= jnp.cumsum(mine) <= even
            single &= ~mine
            pairs.append((size, *_pick(mine)))
    out = run_singles(out, *_pick(single))
    for size, chunk_of, count in pairs:
        body = _pair(xs, weights, group_rows, plan, size, chunk_of)
        out = lax.fori_loop(0, count // 2, body, out)
    return out


def _pick(mask: jax.Array) -> Picked:
    """i -> the i-th chunk of `mask`, and how many there are."""
    index, number = jnp.arange(mask.shape[0], dtype=jnp.int32), jnp.cumsum(mask) - 1

    def chunk_of(i: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask & (number == i), index, 0), dtype=jnp.int32)

    return chunk_of, jnp.sum(mask, dtype=jnp.int32)


def _pair(
    xs: jax.Array,
    weights: GatedWeights,
    group_rows: jax.Array | None,
    plan: ChunkPlan,
    size: int,
    chunk_of: Callable[[jax.Array], jax.Array],
) -> Callable[[jax.Array, Bits], Bits]:
    """The loop body that computes chunks `chunk_of(2 i)` and `chunk_of(2 i + 1)`."""
    hidden = hidden_fn(weights.activation)

    def body(i: jax.Array, out: Bits) -> Bits:
        chunks = [chunk_of(2 * i), chunk_of(2 * i + 1)]
        groups = [plan.group[chunk] for chunk in chunks]
        rows = groups if group_rows is None else [group_rows[group] for group in groups]
        starts = [plan.row[chunk] for chunk in chunks]
        x = jnp.stack([window(xs, start, size) for start in starts]).astype(jnp.float32)
        gate = _products(x, weights.w_gate, weights.b_gate, rows)
        up = _products(x, weights.w_up, weights.b_up, rows)
        y = _products(hidden(gate, up), weights.w_down, weights.b_down, rows)
        results = (y, gate, up)[: len(out)]
        for n, (chunk, start) in enumerate(zip(chunks, starts, strict=True)):
            own = (jnp.arange(size) < plan.rows[chunk])[:, None]
            out = tuple(
                _put_own(o, result[n].astype(xs.dtype), start, own)
                for o, result in zip(out, results, strict=True)
            )
        return out

    return body


def _products(
    x: jax.Array, stack: Matrix, biases: jax.Array | None, rows: list[jax.Array]
) -> jax.Array:
    """[2, S, A] times rows of a stack [R, A, B], plus their biases, in float32: [2, S, B]."""
    matrices = jnp.stack([read_row(stack, row) for row in rows])
    y = lax.dot_general(x, matrices, (((2,), (1,)), ((0,), (0,))))
    if biases is None:
        return y
    return y + jnp.stack([read_part(biases, row) for row in rows]).astype(jnp.float32)[:, None]


def _put_own(bits: jax.Array, rows: jax.Array, start: jax.Array, own: jax.Array) -> jax.Array:
    """`rows` written where `own` holds: what follows belongs to a chunk that is done."""
    old = window(bits, start, rows.shape[0])
    return put(bits, jnp.where(own, to_bits(rows), old), start)
