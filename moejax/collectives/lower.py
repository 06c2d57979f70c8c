"""Runs a schedule inside `shard_map`: one `ppermute` per rail and step, everything else local.

The steps are unrolled and no buffer is written: each message that lands is a value of its own, and
where a rank finds a chunk is a position in the list of values so far, known when tracing (`plan`).
The gradient is that of these operations: a permutation for a permutation. Codecs are passed
straight through: cotangents travel back by the same codec.

Letters:
    C  chunks that a rank starts with    M  chunks in the messages of a step    R  ranks
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moejax.collectives.plan import Message, Table, make_plan
from moejax.collectives.plan import arrived_chunks as arrived_chunks
from moejax.collectives.schedule import Codec, Schedule
from moejax.core.errors import check
from moejax.kernels.vma import vary_over

Transform = Callable[[int, Any], Any]
Hook = Callable[[int, Any, Any], Any]
Pairs = tuple[tuple[int, int], ...]
COMBINE = {"add": lax.add, "max": lax.max, "xor": lax.bitwise_xor}


def run_schedule(
    schedule: Schedule,
    x: Any,
    *,
    prepare: Callable[[Any], Any] | None = None,
    transform: Transform | None = None,
    hook: Hook | None = None,
    carry: Any = None,
) -> tuple[Any, Any]:
    """Executes the schedule on this rank's chunks; call it inside `shard_map`.

    Args:
        schedule: over mesh axes that are manual here, with the sizes that they have.
        x: array or tree of arrays [C, ...], row i being chunk `schedule.start[rank][i]`. Rows of
            any shape and dtype; each array travels as a message of its own.
        prepare: called once per start chunk as `prepare(row) -> row`, rows [1, ...]; what it
            returns takes the chunk's place. Calls depend on nothing but their chunk, so those of
            chunks that are used late may run while others travel.
        transform: called after every step as `transform(step, arrived) -> rows`; what it returns,
            M rows in the same order, takes the place of what landed and travels on in its stead.
        hook: called after every step as `hook(step, arrived, carry) -> carry`, with the rows
            [M, ...] that landed in this step, those of rail 0 first: sums where the schedule adds,
            transformed where asked, without meaning where `arrived_chunks` is -1. It depends on
            nothing that lands later, so the compiler may run it while the next steps travel.
        carry: what the first hook gets; any tree, and it may change its shape.

    Returns:
        The rows of `schedule.end[rank]`, and the last carry.

    Raises `InputError` for a schedule that `simulate` refuses, another mesh, or other rows than C,
    for `xor` of floating rows, and for codes of others.
    """
    _check_fits(schedule, x)
    x = vary_over(schedule.axes, x)
    if schedule.native:
        unhooked = prepare is None and transform is None and hook is None
        check(unhooked, f"native {schedule.native} takes no prepare, transform or hook")
        return _native(schedule, x), carry
    plan = make_plan(schedule)
    rank = lax.axis_index(schedule.axes)
    values = _split(_take(x, plan.order, rank), len(schedule.start[0]))
    if prepare is not None:
        values = [prepare(value) for value in values]
    for index, messages in enumerate(plan.steps):
        with jax.named_scope(f"collective_step_{index}"):
            landed = _tie(_exchange(schedule, messages, values, rank))
        arrived = _concatenate(landed)
        if transform is not None:
            arrived = transform(index, arrived)
        width = sum(message.width for message in messages)
        _check_rows(arrived, width, f"step {index}: transform returns")
        values += _split(arrived, width)
        if hook is not None:
            carry = hook(index, arrived, carry)
    return _pick(values, plan.result, rank), carry


def run_together(schedules: Sequence[Schedule], xs: Sequence[Any]) -> list[Any]:
    """Several schedules step by step at once, as `run_schedule` runs one; what each returns.

    Steps of the same number are in flight together. Native schedules run before all others.
    """
    results, going = {}, {}
    for k, (schedule, x) in enumerate(zip(schedules, xs, strict=True)):
        if schedule.native:
            results[k] = run_schedule(schedule, x)[0]
            continue
        _check_fits(schedule, x)
        plan, rank = make_plan(schedule), lax.axis_index(schedule.axes)
        rows = _take(vary_over(schedule.axes, x), plan.order, rank)
        going[k] = schedule, plan, rank, _split(rows, len(schedule.start[0]))
    for index in range(max((len(plan.steps) for _, plan, _, _ in going.values()), default=0)):
        with jax.named_scope(f"collective_step_{index}"):
            moving = {k: one for k, one in going.items() if index < len(one[1].steps)}
            landed = {
                k: _exchange(schedule, plan.steps[index], values, rank)
                for k, (schedule, plan, rank, values) in moving.items()
            }
            tied = iter(_tie([row for rows in landed.values() for row in rows]))
        for _, plan, _, values in moving.values():
            for message in plan.steps[index]:
                values += _split(next(tied), message.width)
    for k, (_, plan, rank, values) in going.items():
        results[k] = _pick(values, plan.result, rank)
    return [results[k] for k in range(len(results))]


def _native(schedule: Schedule, x: Any) -> Any:
    axes, operation = schedule.axes, schedule.native

    def run(leaf: jax.Array) -> jax.Array:
        if operation == "all_reduce":
            return lax.pcast(lax.psum(leaf, axes), axes, to="varying")
        if operation == "reduce_scatter":
            return lax.psum_scatter(leaf, axes, tiled=True)
        if operation == "all_gather":
            return lax.all_gather(leaf, axes, tiled=True)
        check(operation == "all_to_all", f"native {operation!r} has no collective")
        return lax.all_to_all(leaf, axes, 0, 0, tiled=True)

    return jax.tree.map(run, x)


def _exchange(
    schedule: Schedule, messages: Sequence[Message], values: list, rank: jax.Array
) -> list[Any]:
    """What lands in one step, by rail; what is read again of coded messages goes to `values`."""
    rows = [_pick(values, message.sent, rank) for message in messages]
    travelled = []
    for message, row in zip(messages, rows, strict=True):
        axes, pairs = _in_mesh_order(schedule, message.pairs)
        if message.codec is None:
            travelled.append(lax.ppermute(row, axes, pairs))
            continue
        again, arrived = _send_coded(row, message.codec, axes, pairs)
        values += _split(again, message.width)
        travelled.append(arrived)
    return [
        _combined(message, arrived, values, rank)
        for message, arrived in zip(messages, travelled, strict=True)
    ]


def _tie(landed: list[Any]) -> list[Any]:
    """XLA:TPU runs independent chains of permutes one after the other, unless tied."""
    return list(lax.optimization_barrier(tuple(landed))) if len(landed) > 1 else landed


def _combined(message: Message, arrived: Any, values: list, rank: jax.Array) -> Any:
    if message.held is None:
        return arrived
    if message.combine == "xor":
        for leaf in jax.tree.leaves(arrived):
            whole = not jnp.issubdtype(leaf.dtype, jnp.inexact)
            check(whole, f"xor wants whole numbers, got {leaf.dtype}; bitcast it")
    held = _pick(values, message.held, rank)
    return jax.tree.map(COMBINE[message.combine], arrived, held)


def _send_coded(rows: Any, codec: Codec, axes: tuple[str, ...], pairs: list) -> tuple[Any, Any]:
    """Rows as their sender reads them again, and as they arrive."""

    def travel(leaf: jax.Array, pairs: list) -> tuple[jax.Array, jax.Array]:
        check(jnp.issubdtype(leaf.dtype, jnp.floating), f"{codec} codes no {leaf.dtype}")
        flat = leaf.reshape(leaf.shape[0], -1)
        wire = codec.encode(flat)
        both = (wire, lax.ppermute(wire, axes, pairs))
        again, arrived = (codec.decode(one, flat.shape[1], leaf.dtype) for one in both)
        return again.reshape(leaf.shape), arrived.reshape(leaf.shape)

    @jax.custom_vjp
    def send(leaf):
        return travel(leaf, pairs)

    def backward(_, cotangents):
        kept, sent = cotangents
        return (kept + travel(sent, [(dst, src) for src, dst in pairs])[1],)

    send.defvjp(lambda leaf: (send(leaf), None), backward)
    leaves, treedef = jax.tree.flatten(rows)
    both = zip(*(send(leaf) for leaf in leaves), strict=True)
    again, arrived = (treedef.unflatten(list(part)) for part in both)
    return again, arrived


def _in_mesh_order(
    schedule: Schedule, pairs: Pairs
) -> tuple[tuple[str, ...], list[tuple[int, int]]]:
    """The same messages, with axes ordered, and ranks counted, as in the mesh.

    jax 0.10.2 takes the numbers of a `ppermute` over several axes in the order of the mesh,
    whatever the order of the names; `axis_index` and `all_gather` go by the names.
    """
    if len(schedule.axes) == 1:
        return schedule.axes, list(pairs)
    names, number = jax.sharding.get_abstract_mesh().axis_names, _mesh_numbers(schedule)
    axes = tuple(sorted(schedule.axes, key=names.index))
    return axes, [(number[a], number[b]) for a, b in pairs]


def _mesh_numbers(schedule: Schedule) -> list[int]:
    """Of every rank, its number when the schedule's axes are ordered as in the mesh."""
    names = jax.sharding.get_abstract_mesh().axis_names
    order = sorted(range(len(schedule.axes)), key=lambda i: names.index(schedule.axes[i]))
    grid = np.arange(schedule.num_ranks).reshape([schedule.sizes[i] for i in order])
    return grid.transpose(np.argsort(order)).reshape(-1).tolist()


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


def check_sizes(schedule: Schedule) -> None:
    """Raises `InputError` for a mesh whose axes have other sizes."""
    for axis, size in zip(schedule.axes, schedule.sizes, strict=True):
        actual = lax.axis_size(axis)
        check(actual == size, f"the schedule is for {axis}={size}, the mesh has {axis}={actual}")


def _check_fits(schedule: Schedule, x: Any) -> None:
    check_sizes(schedule)
    check(len(jax.tree.leaves(x)) > 0, "there is no array to move")
    _check_rows(x, len(schedule.start[0]), "the schedule moves what every rank starts with")


def _check_rows(tree: Any, rows: int, what: str) -> None:
    for leaf in jax.tree.leaves(tree):
        check(
            leaf.ndim >= 1 and leaf.shape[0] == rows,
            f"{what}: {rows} chunks, got an array of shape {leaf.shape}",
        )
