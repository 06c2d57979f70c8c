"""Cross entropy against probabilities, and the sum of the loss's terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.training.loss import cross_entropy, train_loss
from tests.training.helpers import tiny_model, tiny_train


def test_cross_entropy_is_minus_log_probability():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 3, 5)) * 4, jnp.float32)
    targets = jnp.asarray(rng.integers(0, 5, (2, 3)), jnp.int32)
    probs = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    want = -np.log([[probs[b, s, targets[b, s]] for s in range(3)] for b in range(2)])
    np.testing.assert_allclose(cross_entropy(logits, targets), want, rtol=1e-5)


def test_cross_entropy_survives_extreme_logits():
    logits = jnp.array([[[1e4, -1e4]]])
    assert float(cross_entropy(logits, jnp.array([[1]]))[0, 0]) == 2e4


def test_loss_is_the_weighted_sum_of_its_terms(params, run_forward):
    model, cfg = tiny_model(), tiny_train(load_balancing_weight=0.5, router_z_weight=0.25)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 3)), jnp.int32)
    loss, metrics = jax.jit(train_loss, static_argnums=(2, 3))(params, tokens, model, cfg)
    output = run_forward(params, tokens[:, :-1], model)
    layers = output.metrics
    assert metrics.expert_load.shape == (2, 4)
    assert int(metrics.expert_load.sum()) == 2 * 4 * 2  # layers, tokens, top-k
    want = cross_entropy(output.logits, tokens[:, 1:]).mean()
    assert float(metrics.cross_entropy) == pytest.approx(float(want), rel=1e-6)
    for name in ("load_balancing_loss", "router_z_loss"):
        mean = float(getattr(layers, name).mean())
        assert float(getattr(metrics, name)) == pytest.approx(mean, rel=1e-6)
    want = want + 0.5 * metrics.load_balancing_loss + 0.25 * metrics.router_z_loss
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
