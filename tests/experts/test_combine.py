"""The weighted sum over a token's experts: order and precision."""

import jax.numpy as jnp
import numpy as np

from moejax.experts.combine import combine


def test_combine_adds_in_float32_first_choice_first():
    big, small = 2.0**24, 1.0
    outputs = jnp.asarray([[[big], [small], [small]], [[small], [small], [big]]])
    got = combine(outputs, jnp.ones((2, 3)))
    # (2^24 + 1) + 1 rounds twice to 2^24; (1 + 1) + 2^24 does not.
    np.testing.assert_array_equal(got[:, 0], [big, big + 2])
    thirds = jnp.full((1, 3), 1 / 3)
    half = combine(jnp.ones((1, 3, 2), jnp.bfloat16) * 3, thirds)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.astype(jnp.float32), np.full((1, 2), 3.0))
