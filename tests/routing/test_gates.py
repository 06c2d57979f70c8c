"""Token-choice gates against a plain numpy evaluation, and the edges of the contract."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams, choose, init_router, route, router_logits
from tests.routing.plain import plain_cosines, plain_route

T, D, E = 33, 12, 8
ROUTE = jax.jit(route, static_argnames="cfg")

GROUPED = dict(num_experts=E, top_k=3, num_groups=4, top_groups=2)
CONFIGS = {
    "softmax": RouterConfig(num_experts=E, top_k=3),
    "softmax_raw": RouterConfig(num_experts=E, top_k=2, renormalize=False),
    "scaled_bias": RouterConfig(num_experts=E, top_k=2, correction_bias=True, scaling_factor=1.5),
    "sigmoid": RouterConfig(num_experts=E, top_k=3, score="sigmoid"),
    "sigmoid_raw": RouterConfig(num_experts=E, top_k=3, score="sigmoid", renormalize=False),
    "v2_groups": RouterConfig(**GROUPED, renormalize=False, scaling_factor=16.0),
    "v3_groups": RouterConfig(
        **GROUPED,
        score="sigmoid",
        correction_bias=True,
        group_score="top2_sum",
        scaling_factor=2.5,
    ),
    "all_experts": RouterConfig(num_experts=E, top_k=E),
    "balanced": RouterConfig(
        num_experts=E, top_k=4, num_groups=2, group_choice="balanced", renormalize=False
    ),
    "balanced_bias": RouterConfig(
        num_experts=E,
        top_k=4,
        num_groups=4,
        group_choice="balanced",
        score="sigmoid",
        correction_bias=True,
    ),
}


@pytest.fixture(scope="module")
def inputs():
    k_x, k_router, k_bias = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(k_x, (T, D))
    w_router = jax.random.normal(k_router, (D, E))
    bias = 0.4 * jax.random.normal(k_bias, (E,))
    return x, w_router, bias


def params_of(w_router, bias, cfg):
    return RouterParams(w_router=w_router, correction_bias=bias if cfg.correction_bias else None)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_plain_numpy(name, inputs):
    x, w_router, bias = inputs
    cfg = CONFIGS[name]
    params = params_of(w_router, bias, cfg)
    routing = ROUTE(params, x, cfg)
    logits = np.asarray(x) @ np.asarray(w_router)
    ids, weights = plain_route(logits, np.asarray(bias) if cfg.correction_bias else None, cfg)
    np.testing.assert_array_equal(routing.topk_idx, ids)
    np.testing.assert_allclose(routing.topk_weights, weights, rtol=2e-5)
    np.testing.assert_allclose(routing.router_logits, logits, atol=1e-5)
    assert routing.topk_idx.dtype == jnp.int32
    assert routing.topk_weights.dtype == routing.router_logits.dtype == jnp.float32


def test_bias_moves_the_choice_and_never_the_weights(inputs):
    x, w_router, bias = inputs
    cfg = RouterConfig(num_experts=E, top_k=2, correction_bias=True, renormalize=False)
    biased = ROUTE(params_of(w_router, bias, cfg), x, cfg)
    unbiased = ROUTE(params_of(w_router, 0 * bias, cfg), x, cfg)
    assert np.any(biased.topk_idx != unbiased.topk_idx)
    score = jax.nn.softmax(unbiased.router_logits, axis=-1)
    own = np.take_along_axis(np.asarray(score), np.asarray(biased.topk_idx), axis=-1)
    np.testing.assert_allclose(biased.topk_weights, own, rtol=1e-6)
    np.testing.assert_array_equal(biased.router_logits, unbiased.router_logits)


@pytest.mark.parametrize("seed", range(3))
def test_balanced_groups_are_equally_loaded_in_every_batch(seed):
    """MoGE's imbalance score, (max - min of the groups' loads) / tokens, is 0 by construction."""
    cfg, rng = CONFIGS["balanced"], np.random.default_rng(seed)
    logits = rng.normal(size=(T, E)) * 5 + np.where(np.arange(E) < 3, 9.0, 0.0)  # a hot group
    params = RouterParams(w_router=np.eye(E, dtype=np.float32))
    mask = rng.random(T) < 0.8
    idx = np.asarray(ROUTE(params, logits.astype(np.float32), cfg, mask=mask).topk_idx)
    load = [((idx >= 4 * group) & (idx < 4 * group + 4)).sum() for group in (0, 1)]
    assert load[0] == load[1] == 2 * mask.sum()
    best = np.argsort(-logits, axis=1)[:, : cfg.top_k] // 4  # what top-k would do
    assert np.ptp([(best == group).sum() for group in (0, 1)]) > T


X_MOE = RouterConfig(num_experts=E, top_k=2, projection_dim=3, temperature=0.25)


def test_cosine_logits_equal_numpy(inputs):
    x, w_router, _ = inputs
    w_project, embeddings = np.asarray(w_router)[:, :3], np.asarray(w_router)[:3]
    params = RouterParams(
        w_router=embeddings, w_project=w_project, temperature=np.float32(X_MOE.temperature)
    )
    routing = ROUTE(params, x, X_MOE)
    want = plain_cosines(np.asarray(x, np.float64), w_project, embeddings) / 0.25
    np.testing.assert_allclose(routing.router_logits, want, atol=1e-5)
    ids, weights = plain_route(want, None, X_MOE)
    np.testing.assert_array_equal(routing.topk_idx, ids)
    np.testing.assert_allclose(routing.topk_weights, weights, rtol=2e-5)
    # Directions alone count: neither the length of a token nor that of an expert matters.
    scaled = ROUTE(params.replace(w_router=7 * embeddings), 0.1 * x, X_MOE)
    np.testing.assert_allclose(scaled.router_logits, routing.router_logits, atol=1e-5)


def test_cosine_router_learns_its_temperature_and_survives_zero_tokens(key):
    params = jax.jit(init_router, static_argnums=(1, 2))(key, D, X_MOE)
    assert params.w_router.shape == (3, E) and params.w_project.shape == (D, 3)
    assert params.temperature == X_MOE.temperature
    x = np.random.default_rng(0).normal(size=(T, D)).astype(np.float32)
    x[0] = 0.0

    def loss(params, x):
        logits = router_logits(params, x)
        return jnp.sum(jnp.sin(logits)), logits

    grads, logits = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-4
    logits = np.asarray(logits, np.float64)
    want = np.sum(np.cos(logits) * -logits / X_MOE.temperature)
    np.testing.assert_allclose(grads[0].temperature, want, rtol=1e-4)


# One token, 8 experts in 4 groups of 2, two groups allowed, worked by hand.
HAND_SCORES = [0.70, 0.10, 0.45, 0.44, 0.60, 0.05, 0.50, 0.41]


@pytest.mark.parametrize(
    ("group_score", "bias", "want"),
    [
        # Groups score .70 .45 .60 .50: groups 0 and 2 may be chosen from.
        ("max", None, [0, 4, 1]),
        # Groups score .80 .89 .65 .91: groups 1 and 3, although experts 0 and 4 score highest.
        ("top2_sum", None, [6, 2, 3]),
        # .3 on expert 5 lifts group 2 to .95: groups 2 and 3, expert 5 itself still last (.35).
        ("top2_sum", [0, 0, 0, 0, 0, 0.3, 0, 0], [4, 6, 7]),
        # All biased below zero: masked groups must lose to negative scores, not win with 0.
        ("max", [-1.0] * 8, [0, 4, 1]),
    ],
)
def test_group_limits_worked_by_hand(group_score, bias, want):
    cfg = RouterConfig(**GROUPED, score="sigmoid", correction_bias=True, group_score=group_score)
    bias = None if bias is None else jnp.asarray(bias)
    chosen = choose(jnp.asarray([HAND_SCORES]), bias, cfg)
    assert chosen.tolist() == [want]


def test_ties_go_to_the_lower_id():
    params = RouterParams(w_router=jnp.zeros((D, E)))
    for name in ("softmax", "sigmoid", "v2_groups"):
        cfg = CONFIGS[name]
        routing = ROUTE(params, jnp.ones((2, D)), cfg)
        assert routing.topk_idx.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(
        ROUTE(params, jnp.ones((1, D)), CONFIGS["softmax"]).topk_weights, 1 / 3
    )


@pytest.mark.parametrize("name", ["softmax", "v3_groups"])
def test_padding_takes_no_expert_and_changes_no_other_token(name, inputs):
    x, w_router, bias = inputs
    cfg = CONFIGS[name]
    params = params_of(w_router, bias, cfg)
    mask = jnp.arange(T) % 3 > 0
    full, padded = ROUTE(params, x, cfg), ROUTE(params, x, cfg, mask=mask)
    assert np.all(padded.topk_idx[~mask] == E) and np.all(padded.topk_weights[~mask] == 0)
    np.testing.assert_array_equal(padded.topk_idx[mask], full.topk_idx[mask])
    np.testing.assert_array_equal(padded.topk_weights[mask], full.topk_weights[mask])


def test_forced_choice_takes_its_weights_from_x(inputs):
    x, w_router, bias = inputs
    cfg = CONFIGS["scaled_bias"]
    params = params_of(w_router, bias, cfg)
    free = ROUTE(params, x, cfg)
    again = ROUTE(params, x, cfg, forced_idx=free.topk_idx)
    jax.tree.map(np.testing.assert_array_equal, again, free)
    other = (free.topk_idx + 1) % E
    forced = ROUTE(params, x, cfg, forced_idx=other)
    np.testing.assert_array_equal(forced.topk_idx, other)
    score = np.asarray(jax.nn.softmax(free.router_logits, axis=-1))
    own = np.take_along_axis(score, np.asarray(other), axis=-1)
    want = cfg.scaling_factor * own / own.sum(-1, keepdims=True)
    np.testing.assert_allclose(forced.topk_weights, want, rtol=1e-6)


def test_replayed_padding_weighs_nothing(inputs):
    x, w_router, _ = inputs
    cfg = CONFIGS["softmax"]
    recorded = jnp.full((T, cfg.top_k), E).at[0].set(jnp.arange(3)).at[1, 1:].set(jnp.arange(2))
    routing = ROUTE(params_of(w_router, None, cfg), x, cfg, forced_idx=recorded)
    np.testing.assert_array_equal(routing.topk_idx, recorded)
    np.testing.assert_array_equal(routing.topk_weights > 0, recorded < E)
    np.testing.assert_allclose(routing.topk_weights[:2].sum(-1), 1.0, rtol=1e-6)


def test_sigmoid_scores_that_all_vanish_stay_finite():
    cfg = CONFIGS["sigmoid"]
    params = RouterParams(w_router=jnp.full((D, E), -100.0))
    weights = ROUTE(params, jnp.ones((1, D)), cfg).topk_weights
    np.testing.assert_array_equal(weights, np.zeros((1, 3)))


def test_router_is_float32_on_bfloat16_input(inputs):
    x, w_router, _ = inputs
    logits = router_logits(RouterParams(w_router=w_router), x.astype(jnp.bfloat16))
    exact = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(w_router, np.float64)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=1e-5)


def test_init_has_a_bias_only_when_configured(key):
    plain = init_router(key, D, CONFIGS["softmax"])
    assert plain.correction_bias is None
    wide = RouterConfig(num_experts=64, top_k=2, correction_bias=True)
    params = init_router(key, 64, wide)
    np.testing.assert_array_equal(params.correction_bias, np.zeros(64))
    assert params.w_router.shape == (64, 64) and params.w_router.dtype == jnp.float32
    np.testing.assert_allclose(np.std(params.w_router), 64**-0.5, rtol=0.05)


def test_gradient_reaches_the_router_through_the_weights_alone(inputs):
    x, w_router, bias = inputs
    cfg = CONFIGS["scaled_bias"]

    @partial(jax.jit, static_argnames="cfg")
    def grads(params, x, cfg):
        return jax.grad(lambda p: jnp.sum(route(p, x, cfg).topk_weights[:, 0]))(params)

    got = grads(params_of(w_router, bias, cfg), x, cfg)
    assert np.abs(got.w_router).max() > 1e-3
    np.testing.assert_array_equal(got.correction_bias, np.zeros(E))
