"""Schedules by remote DMA, interpreted on CPU devices: values and gradients of `run_schedule`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.aot.compile import compile_for
from moejax.aot.targets import target_mesh
from moejax.collectives.builders import BUILDERS, native
from moejax.collectives.codecs import Bfloat16
from moejax.collectives.compose import with_codec
from moejax.collectives.dma import run_by_dma
from moejax.collectives.lower import run_schedule
from moejax.core.errors import InputError
from tests.collectives.cases import over, races_found, value_and_gradient

RACES = pltpu.InterpretParams(detect_races=True)
GRID = {"data": 2, "expert": 2}
# Two rails that add; ranks that only send or receive; two axes, in another order than the mesh's.
CASES = [
    ("bidirectional_ring_all_reduce", {"expert": 3}, jnp.float32),
    ("doubling_broadcast", {"expert": 3}, jnp.float32),
    ("two_level_all_to_all", {"expert": 2, "data": 2}, jnp.float32),
]
EVERY = [
    (name, {"data": 2, "expert": 4}, jnp.uint32 if name == "xor_parity" else jnp.float32)
    for name in BUILDERS
]


@pytest.mark.parametrize(
    "name, axes, dtype",
    [*CASES[:1], *(pytest.param(*one, marks=pytest.mark.full) for one in CASES[1:] + EVERY)],
    ids=str,
)
def test_values_and_gradients_are_those_of_permutes(name, axes, dtype):
    schedule = BUILDERS[name].build(axes)
    ours, sharding = over(lambda x: run_by_dma(schedule, x, interpret=RACES), axes)
    theirs, _ = over(lambda x: run_schedule(schedule, x)[0], axes)
    rows = len(schedule.start[0]) * schedule.num_ranks
    numbers = np.random.default_rng(0).integers(0, 5, (rows, 128))
    x = {str(jnp.dtype(dtype)): jax.device_put(jnp.asarray(numbers, dtype), sharding)}
    fns = [lambda x, fn=fn: {k: fn(v) for k, v in x.items()} for fn in (ours, theirs)]
    got, want = jax.jit(lambda x: [value_and_gradient(fn, x) for fn in fns])(x)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not races_found()


@pytest.mark.full
@pytest.mark.parametrize("target", ["v5e:2x4", "v6e:2x4"])
@pytest.mark.parametrize("name", ["torus_all_reduce", "two_level_all_to_all", "xor_parity"])
def test_compiles_for_tpu(target, name):
    """One kernel, no collective of XLA's, nothing kept outside of it."""
    axes = {"data": 2, "expert": 4}
    mesh, spec, schedule = target_mesh(target, **axes), P(tuple(axes)), BUILDERS[name].build(axes)
    dtype = jnp.uint32 if name == "xor_parity" else jnp.bfloat16
    rows = len(schedule.start[0]) * schedule.num_ranks
    x = jax.ShapeDtypeStruct((rows, 1024), dtype, sharding=NamedSharding(mesh, spec))
    body = jax.shard_map(
        lambda x: run_by_dma(schedule, x), mesh=mesh, in_specs=spec, out_specs=spec
    )
    found = compile_for(body, [x])
    assert found.collectives == () and found.memory.device_temporaries == 0
    targets = [one.target for _, _, one in found.module.instructions()]
    assert targets.count("tpu_custom_call") == 1


def test_what_does_not_fit_is_refused():
    ring = BUILDERS["ring_all_reduce"].build(GRID)

    def refuse(schedule, shape, message):
        run, _ = over(lambda x: run_by_dma(schedule, x), GRID)
        with pytest.raises(InputError, match=message):
            jax.eval_shape(run, jax.ShapeDtypeStruct(shape, jnp.float32))

    refuse(ring, (16, 100), r"4 chunks of a multiple of 128 elements want .* \(4, 100\)")
    refuse(ring, (16, 2**20), "10 values of 1048576 float32 are 41943040 bytes, more than")
    refuse(with_codec(ring, Bfloat16()), (16, 128), "with codecs run by `run_schedule` only")
    refuse(native(GRID, "all_reduce"), (16, 128), "only schedules with steps run by DMA")
    long = BUILDERS["ring_all_reduce"].build({"expert": 4})
    refuse(long, (16, 128), "the schedule is for expert=4, the mesh has expert=2")
