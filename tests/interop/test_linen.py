"""The linen module is the functional layer, bit for bit, and trains with optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.interop.linen import MoE
from moejax.layers.moe import MoEConfig, MoEParams, moe
from moejax.routing.config import RouterConfig

CFG = MoEConfig(d_ff=6, router=RouterConfig(num_experts=4, top_k=2), shared_d_ff=5)
LAYER = MoE(CFG)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 8)), jnp.float32)


@pytest.fixture(scope="module")
def variables(x):
    return jax.jit(LAYER.init)(jax.random.key(0), x)


def apply_functional(variables, x):
    y, _, _, metrics = moe(variables["params"]["moe"], x.reshape(-1, 8), CFG)
    return y.reshape(x.shape), metrics


@jax.jit
def both(variables, x):
    """Values and gradients of the module and of the function."""

    def loss(apply, variables):
        y, metrics = apply(variables, x)
        return jnp.square(y).sum() + metrics.load_balancing_loss, (y, metrics)

    grad = jax.value_and_grad(loss, argnums=1, has_aux=True)
    return grad(LAYER.apply, variables), grad(apply_functional, variables)


def test_values_and_gradients_are_those_of_the_layer(variables, x):
    got, want = both(variables, x)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(got[1]))


def test_the_weights_are_the_struct_of_the_layer(variables):
    params = variables["params"]["moe"]
    assert isinstance(params, MoEParams) and len(jax.tree.leaves(params)) == 7
    assert params.experts.w_gate.shape == (4, 8, 6) and params.shared.w_up.shape == (8, 5)


def test_an_optimizer_step_lowers_the_loss(variables, x):
    sgd = optax.sgd(1e-2)
    (before, _), grads = both(variables, x)[0]
    updates, _ = sgd.update(grads, sgd.init(variables))
    (after, _), _ = both(optax.apply_updates(variables, updates), x)[0]
    assert after < before
