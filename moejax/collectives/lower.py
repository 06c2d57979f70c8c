"""Runs a schedule inside `shard_map`: one `ppermute` per rail and step, everything else local.

The steps are unrolled and no buffer is written: each message that lands is a value of its own, and
where a rank finds a chunk is a position in the list of values so far, known when tracing. Ranks
that do the same with different chunks read their start rows in the order of their first use, by
one gather from a constant table; after it the builders' schedules need no index until the last
row. The gradient is that of these operations: a permutation for a permutation.

Letters:
    C  chunks that a rank starts with    M  chunks in the messages of a step    R  ranks
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from moejax.collectives.check import simulate
from moejax.collectives.schedule import Schedule
from moejax.core.errors import check
from moejax.kernels.vma import vary_over

Transform = Callable[[int, Any], Any]
Hook = Callable[[int, Any, Any], Any]
Table = tuple[tuple[int, ...], ...]  # per rank, the positions of some rows


def run_schedule(
    schedule: Schedule,
    x: Any,
    *,
    transform: Transform | None = None,
    hook: Hook | None = None,
    carry: Any = None,
) -> tuple[Any, Any]:
    """Executes the schedule on this rank's chunks; call it inside `shard_map`.

    Args:
        schedule: over mesh axes that are manual here, with the sizes that they have.
        x: array or tree of arrays [C, ...], row i being chunk `schedule.start[rank][i]`. Rows of
            any shape and dtype; each array travels as a message of its own.
        transform: called after every step as `transform(step, arrived) -> rows`; what it returns,
            M rows in the same order, takes the place of what landed and travels on in its stead.
        hook: called after every step as `hook(step, arrived, carry) -> carry`, with the rows
            [M, ...] that landed in this step, those of rail 0 first: sums where the schedule adds,
            transformed where asked, without meaning where `arrived_chunks` is -1. It depends on
            nothing that lands later, so the compiler may run it while the next steps travel.
        carry: what the first hook gets; any tree, and it may change its shape.

    Returns:
        The rows of `schedule.end[rank]`, and the last carry.

    Raises `InputError` for a schedule that `simulate` refuses, another mesh, or other rows than C.
    """
    plan = _plan(schedule)
    _check_fits(schedule, x)
    x = vary_over(schedule.axes, x)
    rank = lax.axis_index(schedule.axes)
    values = _split(_take(x, plan.order, rank), len(schedule.start[0]))
    for index, messages in enumerate(plan.steps):
        with jax.named_scope(f"collective_step_{index}"):
            landed = [_send(schedule, one, values, rank) for one in messages]
            if len(landed) > 1:
                # XLA:TPU runs independent chains of permutes one after the other, unless tied.
                landed = list(lax.optimization_barrier(tuple(landed)))
        arrived = _concatenate(landed)
        if transform is not None:
            arrived = transform(index, arrived)
        width = sum(message.width for message in messages)
        _check_rows(arrived, width, f"step {index}: transform returns")
        values += _split(arrived, width)
        if hook is not None:
            carry = hook(index, arrived, carry)
    return _pick(values, plan.result, rank), carry


def arrived_chunks(schedule: Schedule) -> tuple[np.ndarray, ...]:
    """Per step, int32 [R, M]: the chunks that each rank's hook sees, -1 where none lands."""
    tables = []
    for step in schedule.steps:
        columns = []
        for transfers in step.rails():
            rail = np.full((schedule.num_ranks, len(transfers[0].chunks)), -1, np.int32)
            for one in transfers:
                rail[one.dst] = one.chunks
            columns.append(rail)
        tables.append(np.concatenate(columns, axis=1))
    return tuple(tables)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Message:
    """One rail of one step."""

    pairs: tuple[tuple[int, int], ...]
    sent: Table
    added: Table | None  # what the arriving rows are added to; None for a copy

    @property
    def width(self) -> int:
        return len(self.sent[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """A schedule with positions for chunks: start rows first, then all that lands, in order."""

    order: Table  # start rows by first use
    steps: tuple[tuple[_Message, ...], ...]
    result: Table


@functools.lru_cache(maxsize=256)
def _plan(schedule: Schedule) -> _Plan:
    simulate(schedule)
    position = [{chunk: row for row, chunk in enumerate(chunks)} for chunks in schedule.start]
    num_values = len(schedule.start[0])
    steps = []
    for step in schedule.steps:
        messages, landing = [], []
        for transfers in step.rails():
            sent: list[list[int]] = [[] for _ in schedule.start]
            added: list[list[int]] = [[] for _ in schedule.start]
            for one in transfers:
                sent[one.src] = [position[one.src][chunk] for chunk in one.chunks]
                if one.combine == "add":
                    added[one.dst] = [position[one.dst][chunk] for chunk in one.chunks]
                landing += [(one.dst, chunk, num_values + k) for k, chunk in enumerate(one.chunks)]
            num_values += len(transfers[0].chunks)
            pairs = tuple((one.src, one.dst) for one in transfers)
            messages.append((pairs, sent, added))
        steps.append(messages)
        for dst, chunk, place in landing:
            position[dst][chunk] = place
    result = [[position[r][chunk] for chunk in chunks] for r, chunks in enumerate(schedule.end)]
    return _renumbered(steps, result, len(schedule.start[0]))


def _renumbered(steps: list, result: list[list[int]], num_start: int) -> _Plan:
    """The plan, each rank's start rows renamed by first use."""
    tables = [table for messages in steps for _, *both in messages for table in both] + [result]
    order = []
    for rank in range(len(result)):
        uses = itertools.chain(*(table[rank] for table in tables), range(num_start))
        order.append(tuple(dict.fromkeys(place for place in uses if place < num_start)))
    renamed = [{row: new for new, row in enumerate(rows)} for rows in order]

    def table(places: list[list[int]]) -> Table:
        rows = [tuple(new.get(p, p) for p in row) for new, row in zip(renamed, places, strict=True)]
        # Ranks without a message do what the first one with a message does: nobody reads it.
        filler = next(row for row in rows if row)
        return tuple(row or filler for row in rows)

    return _Plan(
        order=tuple(order),
        steps=tuple(
            tuple(
                _Message(pairs=pairs, sent=table(sent), added=table(added) if any(added) else None)
                for pairs, sent, added in messages
            )
            for messages in steps
        ),
        result=table(result),
    )


def _send(schedule: Schedule, message: _Message, values: list, rank: jax.Array) -> Any:
    axes, pairs = _in_mesh_order(schedule, message.pairs)
    arrived = lax.ppermute(_pick(values, message.sent, rank), axes, pairs)
    if message.added is None:
        return arrived
    return jax.tree.map(lax.add, arrived, _pick(values, message.added, rank))


def _in_mesh_order(
    schedule: Schedule, pairs: tuple[tuple[int, int], ...]
) -> tuple[tuple[str, ...], list[tuple[int, int]]]:
    """The same messages, with axes ordered, and ranks counted, as in the mesh.

    jax 0.10.2 takes the numbers of a `ppermute` over several axes in the order of the mesh,
    whatever the order of the names; `axis_index` and `all_gather` go by the names.
    """
    if len(schedule.axes) == 1:
        return schedule.axes, list(pairs)
    names = jax.sharding.get_abstract_mesh().axis_names
    order = sorted(range(len(schedule.axes)), key=lambda i: names.index(schedule.axes[i]))
    grid = np.arange(schedule.num_ranks).reshape([schedule.sizes[i] for i in order])
    number = grid.transpose(np.argsort(order)).reshape(-1).tolist()
    return tuple(schedule.axes[i] for i in order), [(number[a], number[b]) for a, b in pairs]


def _pick(values: Sequence[Any], table: Table, rank: jax.Array) -> Any:
    """Rows [M, ...] at this rank's positions."""
    if len(set(table)) == 1:
        return _concatenate([values[place] for place in table[0]])
    places = sorted(set(itertools.chain(*table)))
    index = {place: i for i, place in enumerate(places)}
    local = tuple(tuple(index[place] for place in row) for row in table)
    return _take(_concatenate([values[place] for place in places]), local, rank)


def _take(x: Any, table: Table, rank: jax.Array) -> Any:
    """Rows of x in this rank's order; no gather when it is the same for all ranks."""
    if set(table) == {tuple(range(jax.tree.leaves(x)[0].shape[0]))}:
        return x
    mine = lax.dynamic_index_in_dim(np.asarray(table, np.int32), rank, keepdims=False)
    return jax.tree.map(
        lambda leaf: leaf.at[mine].get(mode="promise_in_bounds", unique_indices=True), x
    )


def _concatenate(trees: Sequence[Any]) -> Any:
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *leaves: lax.concatenate(leaves, 0), *trees)


def _split(tree: Any, rows: int) -> list[Any]:
    """`rows` trees of [1, ...]. The transpose of a split is one concatenation."""
    if rows == 1:
        return [tree]
    leaves, treedef = jax.tree.flatten(tree)
    parts = zip(*(lax.split(leaf, (1,) * rows, axis=0) for leaf in leaves), strict=True)
    return [treedef.unflatten(part) for part in parts]


def _check_fits(schedule: Schedule, x: Any) -> None:
    for axis, size in zip(schedule.axes, schedule.sizes, strict=True):
        actual = lax.axis_size(axis)
        check(actual == size, f"the schedule is for {axis}={size}, the mesh has {axis}={actual}")
    check(len(jax.tree.leaves(x)) > 0, "there is no array to move")
    _check_rows(x, len(schedule.start[0]), "the schedule moves what every rank starts with")


def _check_rows(tree: Any, rows: int, what: str) -> None:
    for leaf in jax.tree.leaves(tree):
        check(
            leaf.ndim >= 1 and leaf.shape[0] == rows,
            f"{what}: {rows} chunks, got an array of shape {leaf.shape}",
        )
