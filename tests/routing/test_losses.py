"""Auxiliary losses and statistics against numpy, and at their known values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.structs import Routing
from moejax.routing.config import RouterConfig
from moejax.routing.losses import (
    expert_load,
    load_balancing_loss,
    load_imbalance,
    router_z_loss,
    routing_sums,
    valid_tokens,
)
from tests.routing.plain import plain_scores

T, E, K = 12, 6, 2
SOFTMAX = RouterConfig(num_experts=E, top_k=K)
SIGMOID = RouterConfig(num_experts=E, top_k=K, score="sigmoid")
SUMS = jax.jit(routing_sums, static_argnames="cfg")


def balancing_loss(routing: Routing, cfg: RouterConfig) -> jax.Array:
    return load_balancing_loss(SUMS(routing, cfg))


def z_loss(routing: Routing) -> jax.Array:
    return router_z_loss(SUMS(routing, SOFTMAX))


def routing_of(topk_idx, logits) -> Routing:
    topk_idx = jnp.asarray(topk_idx, jnp.int32)
    weights = jnp.full(topk_idx.shape, 1.0 / topk_idx.shape[1])
    return Routing(
        topk_idx=topk_idx, topk_weights=weights, router_logits=jnp.asarray(logits, jnp.float32)
    )


@pytest.fixture
def routing():
    """Twelve tokens, the first, fifth and last of them padding."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.choice(E, K, replace=False) for _ in range(T)])
    ids[[0, 4, 11]] = E
    return routing_of(ids, rng.normal(size=(T, E)) * 2)


@pytest.mark.parametrize("cfg", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_load_balancing_loss_equals_numpy_over_valid_tokens(cfg, routing):
    ids, logits = np.asarray(routing.topk_idx), np.asarray(routing.router_logits)
    total = 0.0
    valid = [t for t in range(T) if ids[t, 0] < E]
    for e in range(E):
        assigned = sum(ids[t, k] == e for t in valid for k in range(K))
        shares = [plain_scores(logits[t], cfg) for t in valid]
        total += assigned / (len(valid) * K) * np.mean([s[e] / s.sum() for s in shares])
    np.testing.assert_allclose(balancing_loss(routing, cfg), E * total, rtol=1e-5)


def test_load_balancing_loss_at_its_known_values():
    even = [[t % E, (t + 1) % E] for t in range(T)]
    for cfg in (SOFTMAX, SIGMOID):
        np.testing.assert_allclose(
            balancing_loss(routing_of(even, np.zeros((T, E))), cfg), 1.0, rtol=1e-6
        )
    # All tokens on one expert, with certainty: the worst value, E for one choice per token.
    certain = np.where(np.arange(E) == 3, 60.0, 0.0)[None].repeat(T, 0)
    one = RouterConfig(num_experts=E, top_k=1)
    np.testing.assert_allclose(balancing_loss(routing_of([[3]] * T, certain), one), E, rtol=1e-6)
    # Two choices halve the hot expert's share of the assignments.
    np.testing.assert_allclose(
        balancing_loss(routing_of([[3, 0]] * T, certain), SOFTMAX), E / 2, rtol=1e-6
    )


def test_padding_and_its_content_do_not_count(routing):
    noise = jnp.where(valid_tokens(routing, E)[:, None], 0.0, 50.0 * jnp.arange(6.0)[None])
    noisy = routing.replace(router_logits=routing.router_logits + noise)
    np.testing.assert_array_equal(balancing_loss(noisy, SOFTMAX), balancing_loss(routing, SOFTMAX))
    np.testing.assert_array_equal(z_loss(noisy), z_loss(routing))
    padding = routing_of(np.full((T, K), E), routing.router_logits)
    assert balancing_loss(padding, SOFTMAX) == 0.0 and z_loss(padding) == 0.0


@pytest.mark.parametrize("cfg", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_gradient_pushes_the_scores_of_loaded_experts_down(cfg):
    routing = routing_of([[0, 1]] * T, np.zeros((T, E)))
    grad = jax.grad(lambda z: balancing_loss(routing.replace(router_logits=z), cfg))(
        routing.router_logits
    )
    # f = (1/2, 1/2, 0, ...), p = 1/E: d loss / d z = E / T * p_e (f_e - sum f p), softmax; with
    # sigmoid scores of 1/2 the normalised share moves half as much.
    want = (np.array([0.5, 0.5, 0, 0, 0, 0]) - 1 / E) / T * (0.5 if cfg is SIGMOID else 1.0)
    np.testing.assert_allclose(grad, want[None].repeat(T, 0), atol=1e-7)


def test_z_loss_equals_numpy(routing):
    logits = np.asarray(routing.router_logits, np.float64)[np.asarray(valid_tokens(routing, E))]
    want = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    np.testing.assert_allclose(z_loss(routing), want, rtol=1e-5)
    uniform = routing_of([[0, 1]] * T, np.zeros((T, E)))
    np.testing.assert_allclose(z_loss(uniform), np.log(E) ** 2, rtol=1e-6)


def test_load_counts_every_assignment_of_valid_tokens(routing):
    load = expert_load(routing, E)
    want = np.bincount(np.asarray(routing.topk_idx).ravel(), minlength=E + 1)[:E]
    np.testing.assert_array_equal(load, want)
    assert load.dtype == jnp.int32 and load.sum() == (T - 3) * K


def test_imbalance_is_the_busiest_over_the_mean():
    loads = jnp.asarray([[4, 4, 4, 4], [16, 0, 0, 0], [6, 2, 4, 4], [0, 0, 0, 0]])
    np.testing.assert_allclose(load_imbalance(loads), [1.0, 4.0, 1.5, 0.0])
