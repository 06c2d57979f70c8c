"""The choices that a rank serves, moved to the front."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.core.structs import Routing
from moejax.dispatch.ranks import experts_per_rank, own_choices


@pytest.mark.parametrize("width, lost", [(3, 0), (2, 1), (4, 0)])
def test_own_choices(width, lost):
    routing = Routing(
        topk_idx=jnp.array([[7, 0, 6, 4], [1, 2, 3, 8], [8, 8, 8, 8]]),
        topk_weights=jnp.arange(12.0).reshape(3, 4),
        router_logits=jnp.zeros((3, 8)),
    )

    def body(routing):
        local, count = own_choices(routing, "expert", 4, width=width)
        return (local.topk_idx[None], local.topk_weights[None], count[None])

    mesh = make_mesh(expert=2)
    run = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P("expert"))
    idx, weights, count = jax.jit(run)(routing)
    for rank in range(2):
        for t, row in enumerate(np.asarray(routing.topk_idx)):
            own = [(e - 4 * rank, 4 * t + k) for k, e in enumerate(row) if e // 4 == rank]
            got = [
                (e, w)
                for e, w in zip(idx[rank, t].tolist(), weights[rank, t].tolist(), strict=True)
                if e < 4
            ]
            assert got == own[:width]
    assert count.tolist() == [lost, lost]
    assert idx.shape == (2, 3, width)


@pytest.mark.parametrize(
    ("num_experts", "axis", "message"),
    [
        (9, ("data", "expert"), "num_experts=9 is not divisible by the 8 ranks"),
        (16, ("data", "expert"), "num_experts=16 over 8 ranks, the weights hold 1 experts on each"),
        (8, ("expert", "data"), "('expert', 'data') are not in the order of the mesh, ('data', "),
    ],
)
def test_experts_that_are_not_those_of_the_weights_are_refused(num_experts, axis, message):
    spec = P(("data", "expert"))

    def body(weights):
        return weights * experts_per_rank(num_experts, axis, weights)

    run = jax.shard_map(body, mesh=make_mesh(data=2, expert=4), in_specs=spec, out_specs=spec)
    with pytest.raises(InputError, match=re.escape(message)):
        jax.eval_shape(run, jnp.zeros((8, 3)))
