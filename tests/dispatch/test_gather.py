"""All-gather dispatch against the dense reference: values, gradients, counts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.mesh import make_mesh
from moejax.dispatch.gather import gather
from moejax.experts.stage import reference
from moejax.layers.moe import MoEConfig, init_moe, moe
from moejax.layers.parallel import Parallel
from moejax.routing.config import RouterConfig
from tests.kernels.cases import assert_close

E, D, T = 8, 16, 32
CFG = MoEConfig(d_ff=12, router=RouterConfig(num_experts=E, top_k=3))
AXES = ("data", "expert")


def specs(params):
    where = jax.tree.map(lambda _: P(), params)
    return where.replace(experts=jax.tree.map(lambda _: P("expert"), params.experts))


def loss(params, x, mask, *, stage, token_axes=()):
    parallel = Parallel(token_axes=token_axes)
    y, _, _, metrics = moe(params, x, CFG, mask=mask, stage=stage, parallel=parallel)
    total = jnp.sum(jnp.sin(y) * jnp.arange(1.0, D + 1)[None])
    if token_axes:
        total = jax.lax.psum(total, token_axes)
    return total + metrics.load_balancing_loss, metrics


@pytest.fixture(scope="module")
def case():
    params = init_moe(jax.random.key(0), D, CFG, out_scale=1.0, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(1), (T, D))
    mask = jnp.arange(T) % 5 != 0
    want = jax.value_and_grad(partial(loss, stage=reference), argnums=(0, 1), has_aux=True)
    return params, x, mask, jax.jit(want)(params, x, mask)


@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (8, 1)], ids=str)
def test_values_and_gradients_equal_the_reference(case, shape):
    params, x, mask, ((want, want_metrics), want_grads) = case
    mesh = make_mesh(data=shape[0], expert=shape[1])
    body = jax.shard_map(
        partial(loss, stage=gather(num_experts=E, token_axes=AXES), token_axes=AXES),
        mesh=mesh,
        in_specs=(specs(params), P(AXES), P(AXES)),
        out_specs=(P(), P()),
    )
    got_fn = jax.jit(jax.value_and_grad(body, argnums=(0, 1), has_aux=True))
    (got, metrics), grads = got_fn(params, x, mask)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(metrics.expert_load, want_metrics.expert_load)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert_close(np.asarray(ours), np.asarray(theirs))


def test_by_multicast_rows_travel_by_two_kernels():
    """Compiled for GPUs; ids and weights of choices travel as before."""
    mesh = make_mesh(expert=8)
    stage = gather(num_experts=E, inner=reference, lowering="multicast")
    params = jax.eval_shape(
        lambda: init_moe(jax.random.key(0), 128, CFG, out_scale=1.0, dtype=jnp.float32)
    )

    def body(params, x):
        return moe(params, x, CFG, stage=stage, parallel=Parallel(token_axes=("expert",)))[0]

    run = jax.shard_map(
        body, mesh=mesh, in_specs=(specs(params), P("expert")), out_specs=P("expert")
    )
    x = jax.ShapeDtypeStruct((T, 128), jnp.float32)
    text = jax.jit(run).trace(params, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 2
    assert text.count('"stablehlo.all_gather"') == 2
    assert '"stablehlo.reduce_scatter"' not in text
