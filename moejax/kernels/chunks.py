"""Cuts sorted rows into chunks of few static sizes: the plan behind every blocked kernel.

Rows are sorted by group and lie without gaps. A chunk is up to S consecutive rows of one group; it
is computed at the smallest static size that holds it, so no padding is ever stored and an empty
group costs nothing. Kernels loop over the chunks in row order and write whole windows of S rows:
what a window spills past its own rows, the next chunk overwrites.

Axis letters:
    M  rows      G  groups      R  rows of a weight stack
    S  largest size, sizes[-1]  C  chunks at most, min(M // S + G, M)
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from moejax.core.errors import check
from moejax.kernels.rows import from_bits, pad_rows, put, read_row, to_bits, window

# Up to this many rows hardly share experts (the top-k of a token are distinct): no branch needed.
_FEW_ROWS = 8
# Finer steps where operations outweigh the reading of weights; each size costs compile time.
_SIZES = (1, 2, 3, 4, 8, 16, 32, 48, 56, 64, 72, 80, 96, 128)
PyTree = Any
Result = TypeVar("Result")


@struct.dataclass(kw_only=True)
class ChunkPlan:
    """Chunks in row order; entries from `num_chunks` on mean nothing."""

    group: jax.Array  # int32 [C]
    row: jax.Array  # int32 [C], first row
    rows: jax.Array  # int32 [C], rows of its own, 1 .. S
    size_class: jax.Array  # int32 [C], index into sizes
    num_chunks: jax.Array  # int32 []
    first_chunk: jax.Array  # int32 [G + 1], chunks of group g are first_chunk[g] .. [g + 1]
    group_of_row: jax.Array  # int32 [M], G - 1 past the last row


def pick_sizes(num_rows: int) -> tuple[int, ...]:
    """Static chunk sizes, ascending, for `num_rows` rows in all.

    Few rows (decode of one or two tokens) go one at a time: `(1,)`. The largest size is about a
    quarter of the rows, as many as an expert gets when every token of a top-4 layer wants it: a
    larger one would cost every chunk a wider window. Larger groups take several chunks.
    """
    check(num_rows >= 1, f"num_rows={num_rows}, expected at least 1")
    if num_rows <= _FEW_ROWS:
        return (1,)
    return tuple(size for size in _SIZES if size <= max(16, num_rows // 4))


def gradient_sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Fewer of `sizes` with the same largest, because a gradient is slow to compile."""
    return tuple(size for size in sizes if size == 4 or size % 16 == 0 or size == sizes[-1])


def max_chunks(num_groups: int, *, sizes: tuple[int, ...], num_rows: int) -> int:
    """Length C of the plan: an upper bound on the chunks of any `group_sizes`."""
    return min(num_rows // sizes[-1] + num_groups, num_rows)


def plan_chunks(
    group_sizes: jax.Array,
    *,
    sizes: tuple[int, ...],
    num_rows: int,
    first_row: jax.Array | int = 0,
) -> ChunkPlan:
    """The chunks of groups of `group_sizes` (int32 [G]) rows that start at row `first_row`.

    `num_rows` is static and at least `sum(group_sizes)`; `sizes` ascends. Cost: O(C * G) integer
    operations, no sort.
    """
    check(
        len(sizes) > 0 and list(sizes) == sorted(set(sizes)) and sizes[0] >= 1,
        f"sizes={sizes}, expected ascending positive integers",
    )
    with jax.named_scope("plan_chunks"):
        (num_groups,) = group_sizes.shape
        largest = sizes[-1]
        group_sizes = group_sizes.astype(jnp.int32)
        group_starts = jnp.cumsum(group_sizes) - group_sizes + first_row  # [G]
        ends = jnp.cumsum((group_sizes + largest - 1) // largest)  # [G], in chunks
        first_chunk = jnp.concatenate([jnp.zeros_like(ends[:1]), ends])  # [G + 1]
        chunk = jnp.arange(max_chunks(num_groups, sizes=sizes, num_rows=num_rows), dtype=jnp.int32)
        group = jnp.sum(chunk[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
        group = jnp.minimum(group, num_groups - 1)
        offset = (chunk - first_chunk[group]) * largest
        rows = jnp.clip(group_sizes[group] - offset, 0, largest)
        row = jnp.arange(num_rows, dtype=jnp.int32) + first_row
        group_ends = group_starts + group_sizes
        group_of_row = jnp.sum(row[:, None] >= group_ends[None, :], axis=1, dtype=jnp.int32)
        bounds = jnp.asarray(sizes[:-1], jnp.int32)
        size_class = jnp.sum(rows[:, None] > bounds[None, :], axis=1, dtype=jnp.int32)
        return ChunkPlan(
            group=group,
            row=group_starts[group] + offset,
            rows=rows,
            size_class=size_class,
            num_chunks=ends[-1],
            first_chunk=first_chunk,
            group_of_row=jnp.minimum(group_of_row, num_groups - 1),
        )


def switch_size(
    size_class: jax.Array,
    sizes: tuple[int, ...],
    branch: Callable[[int], Callable[..., Result]],
    *operands: jax.Array,
) -> Result:
    """`branch(sizes[size_class])(*operands)`; every branch returns the same shapes."""
    if len(sizes) == 1:
        return branch(sizes[0])(*operands)
    return lax.switch(size_class, [branch(size) for size in sizes], *operands)


def zero_tail(y: jax.Array, num_rows: jax.Array, *, sizes: tuple[int, ...]) -> jax.Array:
    """Zeroes what the last chunk spilled past `num_rows` rows of `y` [M + S, D]."""
    return put(y, jnp.zeros((sizes[-1], y.shape[1]), y.dtype), num_rows)


def fold_groups(
    plan: ChunkPlan,
    group_sizes: jax.Array,
    sizes: tuple[int, ...],
    chunk: Callable[..., tuple[jax.Array, PyTree]],
    rows: jax.Array,
    totals: PyTree,
    group_rows: jax.Array | None,
) -> tuple[jax.Array, PyTree]:
    """Gradient loop: rewrites `rows` chunk by chunk and sums a tree of arrays per group.

    `chunk(size, rows_window, start, own_rows, row)` returns the new rows [size, D] and float32
    addends shaped like a row of `totals`. The sum over a group's chunks is written once, so that
    `totals` [R, ...] (zeros) are never read back; with `group_rows` it is added instead, as two
    groups may share a row.
    """
    largest = sizes[-1]
    nonempty = jnp.flatnonzero(group_sizes > 0, size=group_sizes.shape[0], fill_value=0)

    def branch(size):
        def run(*operands):
            new, addends = chunk(size, *operands)
            return pad_rows(new.astype(rows.dtype), largest), addends

        return run

    def run_chunk(i, bits, row, run):
        start, own_rows = plan.row[i], plan.rows[i]
        old = from_bits(window(bits, start, largest), rows.dtype)
        new, addends = run(old, start, own_rows, row)
        own = (jnp.arange(largest) < own_rows)[:, None]
        return put(bits, to_bits(jnp.where(own, new, old)), start), addends

    def fold_group(j, carry):
        bits, total_bits = carry
        group = nonempty[j]
        row = group if group_rows is None else group_rows[group]
        last = plan.first_chunk[group + 1] - 1
        # Only the last chunk of a group can be smaller than S: one switch per group suffices.
        any_size = functools.partial(switch_size, plan.size_class[last], sizes, branch)
        first = run_chunk(last, bits, row, any_size)

        def add_full(i, carry):
            bits, sums = carry
            bits, addends = run_chunk(i, bits, row, branch(largest))
            return bits, jax.tree.map(jnp.add, sums, addends)

        bits, sums = lax.fori_loop(plan.first_chunk[group], last, add_full, first)

        def store(stored, value, total):
            if group_rows is not None:
                value += read_row(stored, row)
            value = to_bits(value.astype(total.dtype))
            return lax.dynamic_update_index_in_dim(stored, value, row, 0)

        return bits, jax.tree.map(store, total_bits, sums, totals)

    carry = (to_bits(rows), jax.tree.map(to_bits, totals))
    bits, total_bits = lax.fori_loop(0, jnp.sum(group_sizes > 0), fold_group, carry)
    totals = jax.tree.map(lambda b, total: from_bits(b, total.dtype), total_bits, totals)
    return from_bits(bits, rows.dtype), totals
