"""Experts that travel: exact values and gradients, bytes that do not know E."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.aot.collectives import collectives
from moejax.aot.hlo import parse_hlo
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.dispatch.gather import gather
from moejax.dispatch.materialize import gather_experts, hottest, materialize
from moejax.experts.stage import reference
from tests.dispatch.cases import E, check_exact, compiled, layout, routings


def test_with_a_dispatch_for_the_rest_it_equals_the_reference():
    where = layout(2, 4)
    rest = gather(num_experts=E, token_axes=where.token_axes, inner=reference)
    stage = materialize(rest, num_experts=E, num_copies=3, token_axes=where.token_axes)
    run = compiled(stage, where)
    for idx in routings().values():
        check_exact(run, idx)


def test_without_one_the_rest_is_counted():
    where = layout(1, 8)
    stage = materialize(num_experts=E, num_copies=5, token_axes=where.token_axes, inner=reference)
    run = compiled(stage, where)
    # All tokens choose among five experts: the copies serve everything.
    metrics = check_exact(run, routings()["empty_experts"])
    assert metrics.lookups > 5
    idx = routings()["uniform"]
    load = np.bincount(idx.reshape(-1), minlength=E)
    hot = np.argsort(-load, kind="stable")[:5]
    check_exact(run, idx, dropped=~np.isin(idx, hot))


def test_the_transpose_is_the_sum_at_home():
    mesh, size = make_mesh(expert=8), 32
    weights = jax.random.normal(jax.random.key(0), (size, 3))
    scale = jax.random.normal(jax.random.key(1), (8, 2, 3))

    def body(weights, ids, scale):
        copies = gather_experts(weights, ids, "expert")
        return jax.lax.psum(jnp.sum(copies * scale[0]), "expert")

    in_specs = (P("expert"), P(), P("expert"))
    run = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=P())
    grads = jax.jit(jax.grad(run))(weights, jnp.array([29, 5]), scale)
    want = np.zeros((size, 3), np.float32)
    want[[29, 5]] = scale.sum(0)
    np.testing.assert_allclose(grads, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_copies", [1, 3])
def test_bytes_are_those_of_the_copies(num_copies):
    mesh, found = make_mesh(expert=8), []
    for num_experts in (16, 64):
        body = partial(gather_experts, axis="expert")
        run = jax.shard_map(body, mesh=mesh, in_specs=(P("expert"), P()), out_specs=P())
        shapes = (
            jax.ShapeDtypeStruct((num_experts, 6, 4), jnp.float32),
            jax.ShapeDtypeStruct((num_copies,), jnp.int32),
        )
        text = jax.jit(run).lower(*shapes).compile().as_text()
        assert text is not None
        module = parse_hlo(text)
        found.append([(one.kind, one.nbytes) for one in collectives(module, mesh)])
    assert found == [[("all-reduce", num_copies * 6 * 4 * 4)]] * 2


def test_hottest_and_wrong_input():
    np.testing.assert_array_equal(hottest(jnp.array([3, 9, 3, 1]), 2), [1, 0])
    with pytest.raises(InputError, match="num_copies=17 must be between 1 and num_experts=16"):
        materialize(num_experts=E, num_copies=17)
