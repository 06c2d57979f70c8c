"""Schedules on 8 CPU devices against the native collectives: values, gradients, hooks."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from moejax.collectives import compose
from moejax.collectives.builders import (
    BUILDERS,
    ring_all_gather,
    ring_reduce_scatter,
    shifted_all_to_all,
    shifted_round_trip,
    two_level_all_to_all,
)
from moejax.collectives.lower import arrived_chunks, run_schedule
from moejax.collectives.schedule import Schedule, Step, Transfer
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from tests.collectives.cases import (
    NATIVE,
    over,
    sharded,
    two_rails,
    value_and_gradient,
    whole_numbers,
)
from tests.collectives.interpreter import interpret, random_schedule
from tests.experiments.train_steps.runs import finish, start

GRID = {"data": 2, "expert": 4}
ODD = ("halving_doubling_all_reduce", "recursive_doubling_all_reduce", "doubling_broadcast")
PAIRS = [(name, GRID, "auto") for name in BUILDERS]
PAIRS += [(name, {"expert": 3}, "auto") for name in (*ODD, "xor_parity", "ring_all_reduce")]
PAIRS += [(name, {"expert": 1}, "auto") for name in ("ring_all_reduce", "shifted_all_to_all")]
# Ranks are counted over the axes as named, in whatever order the mesh has them.
BY_AXIS = ("ring_all_gather", "two_level_all_to_all", "hierarchical_all_reduce")
PAIRS += [(name, {"expert": 4, "data": 2}, "auto") for name in BY_AXIS]
PAIRS += [(name, GRID, "explicit") for name in BY_AXIS[1:]]


@pytest.mark.parametrize("name, axes, axis_type", PAIRS, ids=str)
def test_values_and_gradients_are_the_native_ones(name, axes, axis_type):
    builder, names = BUILDERS[name], tuple(axes)
    schedule = builder.build(axes)
    rows = len(schedule.start[0])
    native = NATIVE[builder.operation]
    ours, sharding = over(lambda x: run_schedule(schedule, x)[0], axes, axis_type)
    theirs, _ = over(lambda x: {k: native(v, names) for k, v in x.items()}, axes, axis_type)
    x = whole_numbers((rows * schedule.num_ranks, 3), sharding)
    if builder.operation == "parity":
        x = {k: v for k, v in x.items() if "int" in k}
    both = jax.jit(lambda x: [value_and_gradient(fn, x) for fn in (ours, theirs)])
    with jax.set_mesh(sharding.mesh) if axis_type == "explicit" else contextlib.nullcontext():
        results = both(x)
    got, want = (jax.tree.leaves(result) for result in results)
    assert len(got) == len(want) == (2 if builder.operation == "parity" else 6)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


SOME = ["hierarchical_all_reduce", "recursive_doubling_all_reduce", "two_level_all_to_all"]
EVERY = list(BUILDERS)


@pytest.mark.parametrize(
    "processes, names, axes",
    [
        (2, SOME, {"data": 1, "expert": 2}),
        pytest.param(2, EVERY, {"data": 1, "expert": 2}, marks=pytest.mark.full),
        pytest.param(4, EVERY, {"data": 2, "expert": 2}, marks=pytest.mark.full),
    ],
    ids=["2-some", "2-every", "4-every"],
)
def test_processes_agree_with_the_native_ones(tmp_path, processes, names, axes):
    """Over gloo, in one program: values and gradients of four dtypes, parity of whole numbers."""
    file, child = tmp_path / "compared", "tests.collectives.processes_child"
    arguments = [str(file), ",".join(names), *map(str, axes.values())]
    ended = finish(start(processes, child, arguments))
    assert [status for status, _ in ended] == [0] * processes, ended[0][1][-3000:]
    want = {name: 2 if name == "xor_parity" else 6 for name in names}
    assert json.loads(file.read_text()) == want


def test_maxima_and_native_schedules_in_one_program():
    """`with_combine` against `pmax`, and each native schedule against its collective."""
    natives = [compose.native(GRID, op) for op in ("all_gather", "all_to_all", "all_reduce")]
    natives.append(compose.native(GRID, "reduce_scatter"))
    largest = compose.with_combine(BUILDERS["hierarchical_all_reduce"].build(GRID), "max")

    def ours(x):
        values = [run_schedule(one, x[: len(one.start[0])])[0] for one in natives]
        return [*values, run_schedule(largest, x[:4])[0]]

    def theirs(x):
        rows = [x[: len(one.start[0])] for one in natives]
        values = [NATIVE[one.native](r, tuple(GRID)) for one, r in zip(natives, rows, strict=True)]
        return [*values, lax.pcast(lax.pmax(x[:4], tuple(GRID)), tuple(GRID), to="varying")]

    run, x, _ = sharded(lambda x: (ours(x), theirs(x)), GRID, 8)
    got, want = run(x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    ring = BUILDERS["ring_all_reduce"].build(GRID)
    with pytest.raises(InputError, match="xor wants whole numbers, got float32"):
        sharded(lambda x: run_schedule(compose.with_combine(ring, "xor"), x)[0], GRID, 8)[0](x)
    with pytest.raises(InputError, match="native all_gather takes no prepare, transform or hook"):
        sharded(lambda x: run_schedule(natives[0], x, hook=print)[0], GRID, 1)[0](x[:8])


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


@pytest.mark.parametrize("name", [n for n in BUILDERS if n != "doubling_broadcast"])
def test_builders_need_no_gather_between_steps(name):
    """At most one into the order of first use and one into the order of the result."""
    schedule = BUILDERS[name].build(GRID)
    x = jax.ShapeDtypeStruct((len(schedule.start[0]) * 8, 3), jnp.int32)
    jaxpr = str(jax.make_jaxpr(over(lambda x: run_schedule(schedule, x)[0], GRID)[0])(x))
    assert jaxpr.count("gather[") <= 2
    rails = sum(len(step.rails()) for step in schedule.steps)
    assert jaxpr.count("ppermute[") == rails >= len(schedule.steps)


def test_irregular_schedules_run_as_written():
    """Ranks that have nothing in common, against an interpreter in numpy."""
    rng = np.random.default_rng(0)
    schedules = [random_schedule(rng, kind) for kind in ("add", "max", "xor", "add")]

    def ours(x):
        return [run_schedule(schedule, x)[0] for schedule in schedules]

    run, sharding = over(ours, {"expert": 4})
    x = rng.integers(-100, 100, (8, 3), np.int32)
    for schedule, got in zip(schedules, run(jax.device_put(x, sharding)), strict=True):
        want = interpret(schedule, x.reshape(4, 2, 3))
        np.testing.assert_array_equal(got, want.reshape(-1, 3))
