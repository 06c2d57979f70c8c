"""Every lowering is the same all-to-all."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.aot.compile import compile_for
from moejax.aot.targets import target_mesh
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.dispatch.exchange import LOWERINGS, check_lowering, exchange

BOTH = ("data", "expert")


@pytest.mark.parametrize(
    "axis, lowering",
    [
        *((axis, lowering) for axis in ("expert", BOTH) for lowering in ("native", "shifted")),
        ("expert", "dma"),
        pytest.param(BOTH, "dma", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_rows_reach_their_ranks(lowering, axis):
    mesh = make_mesh(data=2, expert=4)
    ranks = 4 if axis == "expert" else 8
    x = jnp.arange(8 * ranks * 3).reshape(8 * ranks, 3)
    run = jax.shard_map(
        partial(exchange, axis=axis, lowering=lowering),
        mesh=mesh,
        in_specs=P(BOTH),
        out_specs=P(BOTH),
    )
    want = np.asarray(x).reshape(8 // ranks, ranks, ranks, 3).swapaxes(1, 2)
    np.testing.assert_array_equal(jax.jit(run)(x), want.reshape(x.shape))


@pytest.mark.full
@pytest.mark.parametrize("target", ["v5e:2x4", "v6e:2x4"])
@pytest.mark.parametrize("axis", ["expert", BOTH], ids=str)
def test_by_dma_it_is_one_kernel_on_tpu(target, axis):
    mesh = target_mesh(target, data=2, expert=4)
    ranks = 4 if axis == "expert" else 8
    shape, sharding = (8 * ranks, 16, 512), NamedSharding(mesh, P(BOTH))
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    body = partial(exchange, axis=axis, lowering="dma")
    run = jax.shard_map(body, mesh=mesh, in_specs=P(BOTH), out_specs=P(BOTH))
    found = compile_for(run, [x])
    kernels = [one.target for _, _, one in found.module.instructions()].count("tpu_custom_call")
    assert kernels == 1 and found.collectives == ()


def test_other_lowerings_are_refused():
    assert LOWERINGS == ("native", "shifted", "dma")
    with pytest.raises(InputError, match="lowering='ring' is not one of"):
        check_lowering("ring")
