"""The nnx module is the functional layer: same values, same gradients, and it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moejax.interop.nnx import MoE
from moejax.layers.moe import MoEConfig, moe
from moejax.routing.config import RouterConfig

CFG = MoEConfig(d_ff=6, router=RouterConfig(num_experts=4, top_k=2), shared_d_ff=5)


def rngs(seed):
    return nnx.Rngs(jax.random.key(seed, impl="rbg"))  # compiles in a fifth of threefry's time


def by_path(leaves_with_path):
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves_with_path}


@pytest.fixture(scope="module")
def layer():
    return MoE(8, CFG, rngs=rngs(0))


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 8)), jnp.float32)


def functional_loss(params, x):
    y, _, _, metrics = moe(params, x.reshape(-1, 8), CFG)
    return jnp.square(y).sum() + metrics.load_balancing_loss, (y.reshape(x.shape), metrics)


def module_loss(layer, x):
    y, metrics = layer(x)
    return jnp.square(y).sum() + metrics.load_balancing_loss, (y, metrics)


def test_values_and_gradients_are_those_of_the_layer(layer, x):
    grads, (y, metrics) = nnx.jit(nnx.grad(module_loss, has_aux=True))(layer, x)
    functional = jax.jit(jax.grad(functional_loss, has_aux=True))
    want_grads, (want, want_metrics) = functional(layer.unwrapped(), x)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(metrics.expert_load, want_metrics.expert_load)
    got = {"/".join(path): leaf[...] for path, leaf in nnx.to_flat_state(grads["params"])}
    want_grads = by_path(jax.tree_util.tree_leaves_with_path(want_grads))
    assert got.keys() == want_grads.keys() and len(got) == 7
    for name, b in want_grads.items():
        scale = float(jnp.abs(b).max())
        assert scale > 0
        np.testing.assert_allclose(got[name], b, atol=1e-5 * scale, err_msg=name)


def test_every_weight_is_a_param_by_path(layer):
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
    assert "params/router/w_router" in paths and "params/experts/w_down" in paths
    assert len(paths) == 7


def test_an_optimizer_step_lowers_the_loss(x):
    layer = MoE(8, CFG, rngs=rngs(1))
    optimizer = nnx.Optimizer(layer, optax.sgd(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        (loss, _), grads = nnx.value_and_grad(module_loss, has_aux=True)(layer, x)
        optimizer.update(layer, grads)
        return loss

    losses = [float(step(layer, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
