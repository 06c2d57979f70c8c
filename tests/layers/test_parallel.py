"""Hidden dims over a mesh axis: one sum forward, one backward, whatever the layer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moejax.core.mesh import make_mesh
from moejax.experts.gated import gated_mlp, init_experts
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.layers.parallel import ALONE, Parallel

COLUMN, ROW = P(None, "model"), P("model")


def mlp(parallel, x, weights):
    return parallel.merge(gated_mlp(weights, parallel.split(x)))


def test_a_split_mlp_has_the_values_and_gradients_of_one_device_and_two_all_reduces():
    weights = init_experts(jax.random.key(0), (), 4, 8, out_scale=1.0, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(1), (3, 4))
    specs = GatedWeights(w_gate=COLUMN, w_up=COLUMN, w_down=ROW)
    there = jax.shard_map(
        partial(mlp, Parallel(model_axis="model")),
        mesh=make_mesh(model=4),
        in_specs=(P(), specs),
        out_specs=P(),
    )

    def loss(run, x, weights):
        return jnp.sum(run(x, weights) ** 2)

    grad = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)), static_argnums=0)
    want = grad(partial(mlp, ALONE), x, weights)
    for got, reference in zip(
        jax.tree.leaves(grad(there, x, weights)), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-6)
    text = grad.lower(there, x, weights).compile().as_text()
    assert text.count(" all-reduce(") == 2


def test_alone_nothing_changes():
    x = jnp.ones((2, 3))
    assert ALONE.split(x) is x and ALONE.merge(x) is x and ALONE.unshard(x) is x
