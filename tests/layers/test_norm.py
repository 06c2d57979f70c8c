"""Root-mean-square normalisation."""

import jax.numpy as jnp
import numpy as np

from moejax.layers.norm import rms_norm


def test_equals_plain_numpy():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)) * 5 + 1
    weight = np.linspace(0.5, 2, 8)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * weight
    got = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), 0.1)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_bfloat16_is_rounded_once_at_the_end():
    rng = np.random.default_rng(1)
    x, weight = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((16, 64), (64,)))
    x64, weight64 = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    want = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * weight64
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == jnp.bfloat16
    # A norm rounded before its weight is applied differs in a quarter of the elements.
    assert np.mean(np.asarray(got) == want.astype(got.dtype)) > 0.99


def test_zero_rows_stay_zero():
    got = rms_norm(jnp.zeros((2, 4)), jnp.ones((4,)), 1e-6)
    np.testing.assert_array_equal(got, np.zeros((2, 4)))
