"""Schedules on 8 CPU devices against the native collectives: values, gradients, hooks."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from moejax.collectives.builders import (
    ring_all_gather,
    ring_reduce_scatter,
    shifted_all_to_all,
    shifted_round_trip,
    two_level_all_to_all,
)
from moejax.collectives.check import simulate
from moejax.collectives.lower import arrived_chunks, run_schedule
from moejax.collectives.schedule import Schedule, Step, Transfer
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from tests.collectives.cases import CASES, GRIDS, ONE_AXIS, sharded, two_rails

PAIRS = [(name, axes, "auto") for name in ONE_AXIS for axes in GRIDS]
PAIRS += [(name, {"data": 2, "expert": 4}, kind) for name in CASES for kind in ("auto", "explicit")]
PAIRS += [("two_level_all_to_all", {"data": 4, "expert": 2}, "auto")]
# Ranks are counted over the axes as named, in whatever order the mesh has them.
PAIRS += [(name, {"expert": 4, "data": 2}, "auto") for name in CASES]


@pytest.mark.parametrize("name, axes, axis_type", PAIRS, ids=str)
def test_values_and_gradients_are_the_native_ones(name, axes, axis_type):
    case = CASES[name]
    schedule = case.build(axes)
    rows = len(schedule.start[0])
    ours, x, mesh = sharded(lambda x: run_schedule(schedule, x)[0], axes, rows, axis_type)
    native, _, _ = sharded(lambda x: case.native(x, tuple(axes)), axes, rows, axis_type)
    context = jax.set_mesh(mesh) if axis_type == "explicit" else contextlib.nullcontext()
    with context:
        results = [_value_and_grad(fn, x) for fn in (ours, native)]
    exact = "reduce" not in name and "gather" not in name
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and got.sharding == want.sharding
        limit = 0 if exact else 1e-6 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=limit)


def _value_and_grad(fn, x):
    @jax.jit
    def both(x):
        y, pullback = jax.vjp(fn, x)
        return y, pullback(jnp.sin(3 * y))[0]

    return jax.tree.map(jax.block_until_ready, both(x))


def test_hand_written_rails_run():
    axes = {"expert": 4}
    ours, x, _ = sharded(lambda x: run_schedule(two_rails(), x)[0], axes, 2)
    got, gradient = _value_and_grad(ours, x)
    for rank in range(4):
        np.testing.assert_array_equal(got.reshape(4, 8, 3)[rank], x)
    np.testing.assert_allclose(gradient, 4 * np.sin(3 * np.asarray(x)), rtol=1e-6)
    assert str(jax.make_jaxpr(ours)(x)).count("optimization_barrier") == 3


def test_ranks_that_do_different_things():
    """A broadcast by doubling: some ranks send, some receive, and one fetches from afar."""
    schedule = Schedule(
        axes=("expert",),
        sizes=(4,),
        num_chunks=4,
        start=((0,), (1,), (2,), (3,)),
        end=((0, 3), (0, 1), (2, 0), (3, 0)),
        steps=(
            Step((Transfer(0, 1, (0,)),)),
            Step((Transfer(0, 2, (0,)), Transfer(1, 3, (0,)), Transfer(3, 0, (3,)))),
        ),
    )
    ours, x, _ = sharded(lambda x: run_schedule(schedule, x)[0], {"expert": 4}, 1)
    wanted = x[np.array([0, 3, 0, 1, 2, 0, 3, 0])]
    got, gradient = _value_and_grad(ours, x)
    np.testing.assert_array_equal(got, wanted)
    uses = np.array([4, 1, 1, 2], np.float32)[:, None]
    np.testing.assert_allclose(gradient, uses * np.sin(3 * np.asarray(x)), rtol=1e-6)


def test_trees_of_any_dtype_travel_together():
    axes = {"expert": 4}
    schedule = shifted_all_to_all(axes)
    mesh = make_mesh(**axes)
    tree = {
        "rows": jnp.arange(16 * 2 * 3, dtype=jnp.bfloat16).reshape(16, 2, 3),
        "ids": jnp.arange(16, dtype=jnp.int32),
        "mask": jnp.arange(16) % 3 == 0,
    }
    run = jax.shard_map(
        lambda x: run_schedule(schedule, x)[0],
        mesh=mesh,
        in_specs=P("expert"),
        out_specs=P("expert"),
    )
    got = jax.jit(run)(tree)
    order = np.arange(16).reshape(4, 4).T.reshape(-1)
    for name, leaf in tree.items():
        assert got[name].dtype == leaf.dtype
        np.testing.assert_array_equal(got[name], leaf[order])


@pytest.mark.parametrize("build", [shifted_all_to_all, two_level_all_to_all, ring_all_gather])
def test_hooks_see_what_arrives_when_it_arrives(build):
    """The rows of each step are the chunks of the table, and the carry passes through all."""
    axes = {"data": 2, "expert": 4}
    schedule = build(axes)
    tables, rows = arrived_chunks(schedule), len(schedule.start[0])

    def record(step, arrived, carry):
        assert arrived.shape == (tables[step].shape[1], 3)
        return [*carry, arrived]

    def run(x):
        steps = run_schedule(schedule, x, hook=record, carry=[])[1]
        return jnp.concatenate(steps)

    seen, x, _ = sharded(run, axes, rows)
    home = {
        chunk: (r, i) for r, chunks in enumerate(schedule.start) for i, chunk in enumerate(chunks)
    }
    wanted = np.concatenate([t for t in tables], axis=1)
    assert wanted.min() >= 0 and len(tables) == len(schedule.steps)
    flat = [home[chunk][0] * rows + home[chunk][1] for chunk in wanted.reshape(-1)]
    np.testing.assert_array_equal(seen(x), np.asarray(x)[flat])


def test_arrived_chunks_marks_ranks_without_a_message():
    schedule = ring_all_gather({"expert": 2})
    cut = dataclasses.replace(schedule, steps=(Step((Transfer(0, 1, (0,)),)),))
    np.testing.assert_array_equal(arrived_chunks(cut)[0], [[-1], [0]])


def test_experts_between_out_and_back():
    """A round trip with a transform: value and gradient of all_to_all, experts, all_to_all."""
    axes = {"data": 2, "expert": 2}
    schedule, names = shifted_round_trip(axes), tuple(axes)

    def expert(rows):
        return jnp.tanh(rows * (1.0 + lax.axis_index(names).astype(jnp.float32)))

    def ours(x):
        def transform(step, arrived):
            return expert(arrived) if step < 3 else arrived

        y, _ = run_schedule(schedule, x, transform=transform)
        mine = (jnp.arange(4) == lax.axis_index(names))[:, None]
        return jnp.where(mine, expert(x), y)

    def native(x):
        x = lax.all_to_all(x, names, 0, 0, tiled=True)
        return lax.all_to_all(expert(x), names, 0, 0, tiled=True)

    run, x, _ = sharded(ours, axes, 4)
    reference, _, _ = sharded(native, axes, 4)
    for got, want in zip(_value_and_grad(run, x), _value_and_grad(reference, x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_schedules_are_static_arguments():
    mesh, traced = make_mesh(expert=4), []

    @jax.jit(static_argnums=0)
    def run(schedule, x):
        traced.append(schedule)
        fn = jax.shard_map(
            lambda x: run_schedule(schedule, x)[0],
            mesh=mesh,
            in_specs=P("expert"),
            out_specs=P("expert"),
        )
        return fn(x)

    x = jnp.ones((16, 3))
    run(ring_reduce_scatter({"expert": 4}), x)
    run(ring_reduce_scatter({"expert": 4}), x)
    assert len(traced) == 1


@pytest.mark.parametrize(
    "schedule, rows, transform, message",
    [
        (shifted_all_to_all({"expert": 8}), 8, None, "is for expert=8, the mesh has expert=4"),
        (shifted_all_to_all({"expert": 4}), 3, None, "4 chunks, got an array of shape"),
        (
            shifted_all_to_all({"expert": 4}),
            4,
            lambda step, rows: rows[:0],
            "step 0: transform returns: 1 chunks, got an array of shape",
        ),
        (
            dataclasses.replace(
                shifted_all_to_all({"expert": 4}), steps=shifted_all_to_all({"expert": 4}).steps[1:]
            ),
            4,
            None,
            "never holds it",
        ),
    ],
)
def test_what_does_not_fit_is_refused(schedule, rows, transform, message):
    run, x, _ = sharded(
        lambda x: run_schedule(schedule, x, transform=transform)[0], {"expert": 4}, rows
    )
    with pytest.raises(InputError, match=message):
        run(x)


@pytest.mark.parametrize("name", CASES)
def test_builders_need_no_gather_between_steps(name):
    """At most one into the order of first use and one into the order of the result."""
    schedule = CASES[name].build({"data": 2, "expert": 4})
    run, x, _ = sharded(
        lambda x: run_schedule(schedule, x)[0], {"data": 2, "expert": 4}, len(schedule.start[0])
    )
    jaxpr = str(jax.make_jaxpr(run)(x))
    assert jaxpr.count("gather[") <= 2
    assert jaxpr.count("ppermute[") == len(schedule.steps)


@pytest.mark.parametrize("seed", range(4))
def test_irregular_schedules_run_as_written(seed):
    """Ranks that have nothing in common, against an interpreter in numpy."""
    schedule = _gossip(np.random.default_rng(seed))
    run, x, _ = sharded(lambda x: run_schedule(schedule, x)[0], {"expert": 4}, 2)
    rows = np.asarray(x).reshape(4, 2, 3)
    held = [dict(zip(schedule.start[r], rows[r], strict=True)) for r in range(4)]
    for step in schedule.steps:
        sent = [[held[one.src][chunk] for chunk in one.chunks] for one in step.transfers]
        for one, values in zip(step.transfers, sent, strict=True):
            for chunk, value in zip(one.chunks, values, strict=True):
                add = one.combine == "add"
                held[one.dst][chunk] = value + held[one.dst][chunk] if add else value
    want = np.concatenate([[held[r][c] for c in schedule.end[r]] for r in range(4)])
    np.testing.assert_array_equal(run(x), want)


def _gossip(rng: np.random.Generator) -> Schedule:
    """Random messages of one chunk, as long as `simulate` accepts them."""
    start = tuple(tuple(rng.choice(6, 2, replace=False).tolist()) for _ in range(4))
    schedule = Schedule(
        axes=("expert",), sizes=(4,), num_chunks=6, start=start, end=start, steps=()
    )
    for attempt in range(60):
        combine = ("copy", "add")[attempt % 2]
        transfers: tuple[Transfer, ...] = ()
        for src, dst in enumerate(rng.permutation(4).tolist()):
            one = Transfer(src, dst, (int(rng.integers(6)),), combine)
            longer = dataclasses.replace(schedule, steps=(*schedule.steps, Step((*transfers, one))))
            with contextlib.suppress(InputError):
                simulate(longer)
                transfers = (*transfers, one)
        if transfers:
            schedule = dataclasses.replace(schedule, steps=(*schedule.steps, Step(transfers)))
    assert {one.combine for step in schedule.steps for one in step.transfers} == {"copy", "add"}
    end = tuple(tuple(sorted(held)) for held in simulate(schedule))
    shortest = min(len(held) for held in end)
    return dataclasses.replace(schedule, end=tuple(held[-shortest:] for held in end))
