"""Bytes of a step: what its collectives move, once per trip of the loops around them."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from moejax.aot.hlo import parse_hlo
from moejax.core.mesh import make_mesh
from moejax.training.traffic import step_traffic


def traffic(trips):
    """Of an all-reduce of 64 floats over `expert`, `trips` times, and one of 16 over `data`."""
    mesh = make_mesh(data=2, expert=4)
    vary = partial(jax.lax.pcast, axis_name="expert", to="varying")

    def body(x):
        def layer(x, _):
            return vary(jax.lax.psum(jnp.sin(x), "expert")), None

        x = jax.lax.scan(layer, vary(x), None, length=trips)[0]
        return jax.lax.psum(x[:16], "data")

    specs = dict(in_specs=P("data"), out_specs=P("expert"))
    compiled = jax.jit(jax.shard_map(body, mesh=mesh, **specs)).lower(jnp.zeros(128)).compile()
    return step_traffic(parse_hlo(compiled.as_text()), mesh)


def all_reduce_bytes(groups, ranks, floats):
    """Reduce-scatter and all-gather: every rank sends every other one its part, twice."""
    return groups * 2 * (ranks - 1) * floats * 4


@pytest.mark.parametrize("trips", [2, 5])
def test_loops_count_once_per_trip(trips):
    got = traffic(trips)
    want = {
        "data": all_reduce_bytes(4, 2, 16),
        "expert": trips * all_reduce_bytes(2, 4, 64),
        "model": 0,
    }
    assert got.nbytes == want and got.unknown_loops == 0


def test_a_loop_of_unknown_trips_is_counted_once_and_reported():
    mesh = make_mesh(expert=8)

    def body(x):
        def step(carry):
            i, x = carry
            return i + jnp.where(x[0] > 0, 1, 2), jax.lax.psum(x, "expert") / 8

        return jax.lax.while_loop(lambda carry: carry[0] < 9, step, (jnp.int32(0), x))[1]

    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P()))
    got = step_traffic(parse_hlo(run.lower(jnp.ones(32)).compile().as_text()), mesh)
    assert got.nbytes["expert"] == all_reduce_bytes(1, 8, 32) and got.unknown_loops == 1
