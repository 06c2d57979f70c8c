"""Pre-attention: two linear maps of the direction of a state, one pair for every layer."""

import jax
import numpy as np

from moejax.predictors import pre_attention
from tests.predictors.test_scorers import noisy


def test_two_maps_of_the_direction():
    params = noisy(
        pre_attention.init_pre_attention, num_layers=3, d_model=4, hidden=5, num_experts=6
    )
    x = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)
    unit = x / np.sqrt((x**2).mean(-1, keepdims=True))
    ask = jax.jit(pre_attention.scores)
    for layer in range(3):
        w_in, w_out, b_out = (
            np.asarray(p[layer]) for p in (params.w_in, params.w_out, params.b_out)
        )
        want = unit @ w_in @ w_out + b_out
        np.testing.assert_allclose(ask(params, layer, x), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ask(params, 1, 10 * x), ask(params, 1, x), rtol=1e-4, atol=1e-5)


def test_an_unfitted_predictor_has_no_favourites():
    params = pre_attention.init_pre_attention(
        jax.random.key(0), num_layers=3, d_model=4, hidden=5, num_experts=6
    )
    np.testing.assert_array_equal(
        pre_attention.scores(params, 2, np.ones((2, 4))), np.zeros((2, 6))
    )
