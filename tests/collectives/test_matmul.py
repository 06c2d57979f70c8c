"""Products beside their collectives: the same numbers, and on TPU one behind the other.

Products are long enough here to hide a permute each; where they are not, the compiler hides as many
permutes as it has products for.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.aot.compile import compile_for
from moejax.aot.targets import target_mesh
from moejax.collectives.builders import (
    doubling_all_gather,
    halving_reduce_scatter,
    hierarchical_all_gather,
    hierarchical_reduce_scatter,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
)
from moejax.collectives.inspect import inspect_collectives
from moejax.collectives.matmul import all_gather_matmul, matmul_reduce_scatter
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh

GRID = {"data": 2, "expert": 2}
SPEC = P(tuple(GRID))


def _over(mesh, schedule, axes=tuple(GRID)):
    def ours(x, w):
        return all_gather_matmul(x, w, schedule)

    def plain(x, w):
        return lax.all_gather(x, axes, tiled=True) @ w

    specs = dict(in_specs=(P(axes), P(None, axes)), out_specs=P(None, axes))
    return [jax.shard_map(fn, mesh=mesh, **specs) for fn in (ours, plain)]


def _scattered(mesh, schedule, axes=tuple(GRID)):
    def ours(x, w):
        return matmul_reduce_scatter(x, w, schedule)

    def plain(x, w):
        return lax.psum_scatter(x @ w, axes, tiled=True)

    specs = dict(in_specs=(P(None, axes), P(axes)), out_specs=P(axes))
    return [jax.shard_map(fn, mesh=mesh, **specs) for fn in (ours, plain)]


GATHERS = (ring_all_gather, hierarchical_all_gather, doubling_all_gather)
SCATTERS = (ring_reduce_scatter, hierarchical_reduce_scatter, halving_reduce_scatter)


@pytest.mark.parametrize(
    "over, builders, shapes",
    [(_over, GATHERS, ((12, 5), (5, 8))), (_scattered, SCATTERS, ((12, 8), (8, 5)))],
)
def test_products_and_gradients_are_those_of_the_plain_one(over, builders, shapes):
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-4, 5, shape).astype(np.float32) for shape in shapes)
    pairs = [over(make_mesh(**GRID), build(GRID)) for build in builders]

    @jax.jit
    def run(x, w):
        def both(fn):
            y, pullback = jax.vjp(fn, x, w)
            return y, pullback(jnp.where(y > 0, 1.0, -1.0))

        return [[both(fn) for fn in pair] for pair in pairs]

    for got, want in run(x, w):
        for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.full
@pytest.mark.parametrize(
    "target, over, build, least",
    [
        ("v5e:2x4", _over, ring_all_gather, 7),
        ("v6e:2x4", _over, ring_all_gather, 2),
        ("v5e:2x4", _scattered, ring_reduce_scatter, 6),
        ("v6e:2x4", _scattered, ring_reduce_scatter, 6),
    ],
)
def test_on_tpu_permutes_hide_behind_products(target, over, build, least):
    """For v6e most of an all-gather are put before the products, whatever their lengths."""
    axes = ("expert",)
    mesh = target_mesh(target, expert=8)
    if over is _over:
        shapes = ((8 * 512, 2048), P(axes)), ((2048, 8 * 8192), P(None, axes))
    else:
        shapes = ((8 * 512, 8 * 8192), P(None, axes)), ((8 * 8192, 2048), P(axes))
    args = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in shapes
    ]
    ours, plain = (
        inspect_collectives(compile_for(fn, args).module, mesh)
        for fn in over(mesh, build({"expert": 8}), axes)
    )
    assert len(ours.flights) == 7 and sum(one.flops > 0 for one in ours.flights) >= least
    assert [one.flops > 0 for one in plain.flights] == [False]


def test_other_schedules_are_refused():
    def refuse(schedule, message):
        ours, _ = _over(make_mesh(**GRID), schedule)
        with pytest.raises(InputError, match=message):
            jax.eval_shape(ours, jnp.zeros((4, 5)), jnp.zeros((5, 4)))

    refuse(ring_all_reduce(GRID), "starts with chunk r on rank r")
    ours, _ = _scattered(make_mesh(**GRID), ring_all_reduce(GRID))
    with pytest.raises(InputError, match="ends with chunk r on rank r"):
        jax.eval_shape(ours, jnp.zeros((8, 4)), jnp.zeros((4, 5)))
    ours, _ = _scattered(make_mesh(**GRID), ring_reduce_scatter(GRID))
    with pytest.raises(InputError, match="6 rows are not divisible by 4 ranks"):
        jax.eval_shape(ours, jnp.zeros((6, 4)), jnp.zeros((4, 5)))
