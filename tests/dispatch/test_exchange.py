"""Every lowering is the same all-to-all."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.mesh import make_mesh
from moejax.dispatch.exchange import LOWERINGS, exchange


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("axis", ["expert", ("data", "expert")], ids=str)
def test_rows_reach_their_ranks(lowering, axis):
    both = ("data", "expert")
    mesh = make_mesh(data=2, expert=4)
    ranks = 4 if axis == "expert" else 8
    x = jnp.arange(8 * ranks * 3).reshape(8 * ranks, 3)
    run = jax.shard_map(
        partial(exchange, axis=axis, lowering=lowering),
        mesh=mesh,
        in_specs=P(both),
        out_specs=P(both),
    )
    want = np.asarray(x).reshape(8 // ranks, ranks, ranks, 3).swapaxes(1, 2)
    np.testing.assert_array_equal(jax.jit(run)(x), want.reshape(x.shape))
