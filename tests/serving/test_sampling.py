"""Sampling: the nucleus by hand, frequencies, and greedy at temperature 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.serving.sampling import next_token, nucleus

PROBS = np.array([[0.05, 0.5, 0.15, 0.3], [0.7, 0.1, 0.1, 0.1]], np.float32)
NEXT = jax.jit(next_token)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.4, [[1], [0]]),
        (0.6, [[1, 3], [0]]),
        (0.9, [[1, 2, 3], [0, 1, 2, 3]]),  # equal probabilities stay together
        (1.0, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (0.0, [[1], [0]]),
    ],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, kept):
    got = nucleus(jnp.log(PROBS), jnp.float32(top_p))
    for row, want in zip(np.asarray(got), kept, strict=True):
        assert list(np.flatnonzero(np.isfinite(row))) == want
    np.testing.assert_allclose(got[np.isfinite(got)], np.log(PROBS)[np.isfinite(got)])


def test_samples_follow_the_renormalised_probabilities():
    draw = jax.vmap(lambda key: next_token(key, jnp.log(PROBS) / 2, 0.5, 0.75))
    tokens = np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(0), 4000)))
    share = np.stack([(tokens == v).mean(0) for v in range(4)], 1)
    np.testing.assert_allclose(share[0], [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(share[1, 0], 0.7, atol=0.03)


def test_temperature_zero_takes_the_best():
    key = jax.random.key(1)
    got = NEXT(key, jnp.log(PROBS), jnp.float32(0), jnp.float32(1))
    assert got.dtype == jnp.int32 and list(got) == [1, 0]
