"""The look-ahead of a gate is that gate: same choices for every kind of router."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.predictors import evaluate, next_gate
from moejax.predictors.mlp import select
from moejax.routing.config import RouterConfig
from moejax.routing.gates import route
from tests.predictors import synthetic
from tests.predictors.synthetic import E, K

KINDS = {
    "softmax": RouterConfig(num_experts=E, top_k=K),
    "sigmoid": RouterConfig(num_experts=E, top_k=K, score="sigmoid"),
    "softmax_bias": RouterConfig(num_experts=E, top_k=K, correction_bias=True),
    "sigmoid_bias": RouterConfig(num_experts=E, top_k=K, score="sigmoid", correction_bias=True),
    "groups": RouterConfig(
        num_experts=E,
        top_k=3,
        score="sigmoid",
        correction_bias=True,
        num_groups=4,
        top_groups=2,
        group_score="top2_sum",
    ),
}


@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
def test_scores_rank_what_the_next_router_chooses(cfg):
    rng = np.random.default_rng(0)
    routers = synthetic.routers(rng, cfg)
    hidden = jnp.asarray(rng.normal(size=(64, synthetic.D)), jnp.float32)
    for layer in range(synthetic.L - 1):
        chosen = np.asarray(route(select(routers, layer + 1), hidden, cfg).topk_idx)
        scores = np.asarray(next_gate.scores(routers, jnp.int32(layer), hidden, cfg))
        best = np.argsort(-scores, axis=-1, kind="stable")[:, : cfg.top_k]
        np.testing.assert_array_equal(np.sort(best), np.sort(chosen))


@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
def test_fresh_gate_control_reads_all(cfg):
    recording, routers = synthetic.rotated_stream(np.random.default_rng(1), 4, 8, cfg=cfg)
    evaluate.check_fresh_gate(recording, routers, cfg)
