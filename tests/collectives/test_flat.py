"""Arrays of any shape through coded schedules: bits on all ranks, error, gradient, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.aot.hlo import parse_hlo
from moejax.collectives.builders import (
    direct_all_reduce,
    hierarchical_all_reduce,
    ring_all_gather,
    ring_all_reduce,
)
from moejax.collectives.codecs import Bfloat16, BlockQuant
from moejax.collectives.compose import with_codec
from moejax.collectives.flat import all_reduce, ravel, unravel
from moejax.collectives.inspect import inspect_collectives
from moejax.collectives.traffic import traffic
from moejax.core.errors import InputError
from tests.collectives.cases import over

GRID = {"data": 2, "expert": 4}
N = 32 * 1024


@pytest.fixture(scope="module")
def sums():
    """Name to (schedule, its sum on every rank), one program for all; and the exact sum."""
    hierarchical = hierarchical_all_reduce(GRID)
    schedules = {
        "plain": hierarchical,
        "slow axis": with_codec(hierarchical, BlockQuant(), "data"),
        "direct": with_codec(direct_all_reduce(GRID), BlockQuant()),
        "ring": with_codec(ring_all_reduce(GRID), BlockQuant()),
    }
    x = np.random.default_rng(0).standard_normal((8, N)).astype(np.float32)

    def run(x):
        # The plain sum's first steps would otherwise be those of the coded one.
        return {k: all_reduce(one, -x if k == "plain" else x) for k, one in schedules.items()}

    run, sharding = over(run, GRID)
    compiled = run.lower(jax.device_put(x, sharding)).compile()
    sums = {k: np.asarray(v) for k, v in compiled(jax.device_put(x, sharding)).items()}
    found = inspect_collectives(parse_hlo(compiled.as_text()), sharding.mesh)
    sums["plain"] = -sums["plain"]
    return schedules, sums, x.sum(0, dtype=np.float64), found


@pytest.mark.parametrize(
    "name, bound", [("slow axis", 0.0075), ("direct", 0.0105), ("ring", 0.016)]
)
def test_ranks_agree_to_the_bit_and_errors_are_small(sums, name, bound):
    _, values, exact, _ = sums
    for rank in range(8):
        np.testing.assert_array_equal(values[name][rank], values[name][0])
    error = np.linalg.norm(values[name][0] - exact) / np.linalg.norm(exact)
    assert bound / 2 < error < bound
    plain = np.linalg.norm(values["plain"][0] - exact) / np.linalg.norm(exact)
    assert plain < 1e-6


def test_only_what_crosses_the_slow_axis_is_coded(sums):
    schedules, _, _, found = sums
    plain, coded = (traffic(schedules[k], 4 * N // 4) for k in ("plain", "slow axis"))
    assert coded["expert"] == plain["expert"]
    assert plain["data"].nbytes * 258 == coded["data"].nbytes * 1024  # 3.97 times fewer
    total = {axis: 0 for axis in GRID}
    for schedule in schedules.values():
        for axis, moved in traffic(schedule, 4 * N // schedule.num_chunks).items():
            total[axis] += moved.nbytes
    assert {axis: moved.nbytes for (_, axis), moved in found.traffic.items()} == total


def test_gradients_pass_straight_through_codes():
    """By a code that loses nothing of small whole numbers: value and gradient of the plain sum."""
    plain, coded = ring_all_reduce(GRID), with_codec(direct_all_reduce(GRID), Bfloat16())
    x = np.random.default_rng(1).integers(-4, 5, (8, 13)).astype(np.float32)

    def both(x):
        results = []
        for schedule in (plain, coded):
            y, pullback = jax.vjp(lambda v, s=schedule: all_reduce(s, {"x": v})["x"], x)
            results.append((y, pullback(jnp.where(y % 2 == 0, 1.0, -1.0))[0]))
        return results

    run, sharding = over(both, GRID)
    want, got = run(jax.device_put(x, sharding))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(np.unique(np.asarray(want[1]))) > 1


def test_trees_become_few_vectors_and_trees_again():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": [jnp.ones((), jnp.int32), jnp.zeros((0, 2))]}
    vectors, spec = ravel(tree)
    assert {name: v.shape for name, v in vectors.items()} == {"float32": (6,), "int32": (1,)}
    again = unravel(vectors, spec)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_no_all_reduce_is_refused():
    with pytest.raises(InputError, match="returns the chunks that it starts with"):
        all_reduce(ring_all_gather(GRID), jnp.ones(8))
    coded = with_codec(ring_all_reduce(GRID), BlockQuant())
    with pytest.raises(InputError, match="codes no int32"):
        over(lambda x: all_reduce(coded, x), GRID)[0](jnp.ones((8, 8), jnp.int32))
