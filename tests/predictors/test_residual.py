"""Learned look-ahead starts as next-gate and learns what lies between two layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.predictors import next_gate, residual
from moejax.routing.config import RouterConfig
from tests.predictors import synthetic
from tests.predictors.synthetic import D, E, K, L


def initial(hidden_units: int = 32) -> residual.ResidualParams:
    return residual.init_residual(
        jax.random.key(1), num_layers=L, d_model=D, num_experts=E, hidden=hidden_units
    )


@pytest.mark.parametrize("bias", [False, True])
def test_unfitted_is_next_gate_to_the_bit(bias):
    cfg = RouterConfig(num_experts=E, top_k=K, score="sigmoid", correction_bias=bias)
    rng = np.random.default_rng(0)
    routers = synthetic.routers(rng, cfg)
    hidden = jnp.asarray(rng.normal(size=(32, D)), jnp.float32)
    for layer in range(L - 1):
        want = next_gate.scores(routers, layer, hidden, cfg)
        got = residual.scores(initial(), layer, hidden, routers, cfg)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_every_target_layer_reads_its_own_net():
    params = initial()
    layer_bias = jnp.arange(L - 1, dtype=jnp.float32)[:, None] + jnp.zeros((1, E))
    params = params.replace(net=params.net.replace(b_out=layer_bias))
    rng = np.random.default_rng(0)
    routers = synthetic.routers(rng)
    hidden = jnp.asarray(rng.normal(size=(5, D)), jnp.float32)

    def body(_, layer):
        return None, residual.scores(params, layer, hidden, routers, synthetic.CFG)

    _, got = jax.lax.scan(body, None, jnp.arange(L - 1))
    for layer in range(L - 1):
        base = next_gate.scores(routers, layer, hidden, synthetic.CFG)
        np.testing.assert_allclose(got[layer], base + layer, rtol=1e-5, atol=1e-5)


def test_net_sees_directions_and_not_lengths():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(8, D)), jnp.float32)
    params = jax.tree.map(lambda p: p[0] + 0.1, initial())
    base = jnp.zeros((8, E))
    short = residual.one_layer(params, hidden, base)
    long = residual.one_layer(params, 100.0 * hidden, base)
    np.testing.assert_allclose(short, long, rtol=1e-4, atol=1e-4)
