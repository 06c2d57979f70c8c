"""Rotary position embedding."""

import jax.numpy as jnp
import numpy as np

from moejax.layers.rope import rope

B, S, H, DH, THETA = 2, 5, 3, 6, 100.0


def plain_rope(x, positions, theta):
    """Each pair (i, i + Dh/2) is a complex number turned by position * theta^(-2i/Dh)."""
    half = x.shape[-1] // 2
    out = np.zeros_like(x)
    for b, s in np.ndindex(positions.shape):
        for i in range(half):
            turn = np.exp(1j * positions[b, s] * theta ** (-2 * i / x.shape[-1]))
            z = (x[b, s, :, i] + 1j * x[b, s, :, i + half]) * turn
            out[b, s, :, i], out[b, s, :, i + half] = z.real, z.imag
    return out


def test_equals_complex_rotation():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(B, S, H, DH)), rng.integers(0, 50, (B, S))
    got = rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions, jnp.int32), THETA)
    np.testing.assert_allclose(got, plain_rope(x, positions, THETA), atol=2e-5)


def test_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, DH)), jnp.float32) for _ in range(2))

    def score(at_q, at_k):
        turned = [rope(x, jnp.full((1, 1), p), THETA) for x, p in ((q, at_q), (k, at_k))]
        return float(jnp.sum(turned[0] * turned[1]))

    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_angles_are_float32_and_the_dtype_is_kept():
    # Position 1001 is not a bfloat16 number: a rounded angle would turn by 1000.
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    got = rope(x, jnp.full((1, 1), 1001), THETA)
    assert got.dtype == jnp.bfloat16
    want = [np.cos(1001.0) - np.sin(1001.0), np.cos(1001.0) + np.sin(1001.0)]
    np.testing.assert_allclose(got.astype(jnp.float32)[0, 0, 0], want, atol=0.01)
