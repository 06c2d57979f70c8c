"""The sparse mixer against a loop over tokens and experts."""

import jax
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams, route
from moejax.routing.sparse_mixer import sparse_mixer

T, E, K = 40, 6, 2


def plain(logits, top_k, threshold):
    """One token: experts in turn, each weighed against those that are left and close to it."""
    left, ids, weights = list(range(len(logits))), [], []
    for _ in range(top_k):
        best = max(left, key=lambda e: logits[e])
        close = [
            e
            for e in left
            if (logits[best] - logits[e]) / max(abs(logits[e]), logits[best]) <= 2 * threshold
        ]
        share = np.exp([logits[e] - logits[best] for e in close])
        ids.append(best)
        weights.append(1 / share.sum())
        left.remove(best)
    return ids, weights


@pytest.mark.parametrize("threshold", [0.01, 0.4])
def test_equals_a_plain_loop(threshold):
    logits = np.random.default_rng(0).normal(size=(T, E)).astype(np.float32) + 0.5
    idx, weights = jax.jit(sparse_mixer, static_argnums=(1, 2))(logits, K, threshold)
    want = [plain(row, K, threshold) for row in logits]
    np.testing.assert_array_equal(idx, [ids for ids, _ in want])
    np.testing.assert_allclose(weights, [w for _, w in want], rtol=1e-5)
    assert (np.asarray(weights) < 0.99).any()  # some choices are close


def test_a_replayed_choice_keeps_its_weights_and_padding_weighs_nothing():
    cfg = RouterConfig(
        num_experts=E, top_k=K, mixer_threshold=0.3, renormalize=False, scaling_factor=2.0
    )
    rng = np.random.default_rng(1)
    params = RouterParams(w_router=rng.normal(size=(8, E)).astype(np.float32))
    x = rng.normal(size=(5, 8)).astype(np.float32)
    mask = np.array([True, True, False, True, True])
    first = route(params, x, cfg, mask=mask)
    again = route(params, x, cfg, forced_idx=first.topk_idx)
    np.testing.assert_array_equal(again.topk_idx, first.topk_idx)
    np.testing.assert_allclose(again.topk_weights, first.topk_weights, rtol=1e-6)
    assert (first.topk_idx[2] == E).all() and not first.topk_weights[2].any()


def test_scores_of_another_kind_are_refused():
    with pytest.raises(InputError, match="sparse mixer wants softmax scores without groups"):
        RouterConfig(num_experts=E, top_k=K, mixer_threshold=0.1)
