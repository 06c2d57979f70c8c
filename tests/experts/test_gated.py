"""One gated expert, and the oracle that evaluates all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.experts.gated import every_expert, gated_mlp, init_experts
from tests.experts.cases import D, E, K, T, experts_of, normal, routing_of, topk_ids


def plain_mlp(weights, index, x):
    gate, up, down = (
        np.asarray(leaf[index], np.float64)
        for leaf in (weights.w_gate, weights.w_up, weights.w_down)
    )
    a = x @ gate
    return (a / (1 + np.exp(-a)) * (x @ up)) @ down


def test_one_expert_equals_plain_numpy():
    weights, x = experts_of(0), normal(9, 3, 5, D)
    one = jax.tree.map(lambda leaf: leaf[2], weights)
    want = plain_mlp(weights, 2, np.asarray(x, np.float64))
    np.testing.assert_allclose(jax.jit(gated_mlp)(one, x), want, atol=1e-5)


@pytest.mark.parametrize("pattern", ["spread", "masked"])
def test_every_expert_gives_each_assignment_its_own_expert(pattern):
    weights, ids, x = experts_of(0), topk_ids(pattern), normal(9, T, D)
    got = jax.jit(every_expert)(weights, x, routing_of(ids))
    assert got.shape == (T, K, D)
    for t in range(T):
        for k in range(K):
            if ids[t, k] == E:
                np.testing.assert_array_equal(got[t, k], np.zeros(D))
            else:
                want = plain_mlp(weights, ids[t, k], np.asarray(x[t], np.float64))
                np.testing.assert_allclose(got[t, k], want, atol=1e-5)


def test_initial_weights_have_unit_gain_per_fan_in(key):
    weights = init_experts(key, (3,), 64, 100, out_scale=0.25, dtype=jnp.bfloat16)
    assert weights.w_gate.shape == weights.w_up.shape == (3, 64, 100)
    assert weights.w_down.shape == (3, 100, 64) and weights.w_down.dtype == jnp.bfloat16
    assert len(jax.tree.leaves(weights)) == 3
    names = ("w_gate", "w_up", "w_down")
    deviation = {name: np.std(np.asarray(getattr(weights, name), np.float32)) for name in names}
    np.testing.assert_allclose(deviation["w_gate"], 64**-0.5, rtol=0.05)
    np.testing.assert_allclose(deviation["w_up"], 64**-0.5, rtol=0.05)
    np.testing.assert_allclose(deviation["w_down"], 0.25 * 100**-0.5, rtol=0.05)
    assert not np.array_equal(weights.w_gate, weights.w_up)
    assert init_experts(key, (), 8, 4, out_scale=1.0, dtype=jnp.float32).w_down.shape == (4, 8)
