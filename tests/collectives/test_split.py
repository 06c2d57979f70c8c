"""Any shares give the same sums; rails are tied step by step; programs are made once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.aot.compile import compile_for
from moejax.aot.targets import target_mesh
from moejax.collectives.builders import native, ring_all_reduce, torus_all_reduce
from moejax.collectives.inspect import inspect_collectives
from moejax.collectives.split import RailSplit, Variants, split_all_reduce
from moejax.core.errors import InputError
from tests.collectives.cases import over

GRID = {"data": 2, "expert": 4}
RINGS = ring_all_reduce(GRID), ring_all_reduce(GRID, -1)


def test_all_shares_give_the_same_sum():
    splits = [
        RailSplit(RINGS, (11, 5)),
        RailSplit(RINGS, (0, 16)),
        RailSplit((*RINGS, torus_all_reduce(GRID)), (3, 5, 8)),
        RailSplit((native(GRID, "all_reduce"), RINGS[1]), (8, 8)),
    ]
    x = np.random.default_rng(0).integers(-9, 9, (8, 3, 37)).astype(np.float32)
    run, sharding = over(lambda x: [split_all_reduce(one, x) for one in splits], GRID)
    for got in run(jax.device_put(x, sharding)):
        np.testing.assert_array_equal(got, np.broadcast_to(x.sum(0), x.shape))
    one = over(lambda x: split_all_reduce(splits[0], x), GRID)[0]
    jaxpr = str(jax.make_jaxpr(one)(x))
    assert (jaxpr.count("ppermute["), jaxpr.count("optimization_barrier")) == (28, 14)


def test_two_rails_are_both_in_flight_on_tpu():
    """Compiled for v5e; untied chains run one after the other there."""
    mesh = target_mesh("v5e:2x2", expert=4)
    rings = ring_all_reduce({"expert": 4}), ring_all_reduce({"expert": 4}, -1)
    split = RailSplit(rings, (8, 8))
    spec = P("expert")
    fn = jax.shard_map(
        lambda x: split_all_reduce(split, x), mesh=mesh, in_specs=spec, out_specs=spec
    )
    x = jax.ShapeDtypeStruct((4, 2**16), jnp.float32, sharding=NamedSharding(mesh, spec))
    found = inspect_collectives(compile_for(fn, [x]).module, mesh)
    assert len(found.flights) == 12
    assert sum(one.in_flight == 2 for one in found.flights) == 6


def test_programs_are_made_once_per_share():
    made = []
    variants = Variants(lambda shares: made.append(shares) or len(made))
    assert [variants.get(s) for s in [(16, 0), (8, 8), (16, 0)]] == [1, 2, 1]
    assert variants.count == 2 and made == [(16, 0), (8, 8)]


@pytest.mark.parametrize("shares", [(16,), (8, 9), (-1, 17)])
def test_shares_are_sixteenths(shares):
    with pytest.raises(InputError, match="shares"):
        RailSplit(RINGS, shares)
