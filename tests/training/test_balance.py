"""Correction biases follow the load, in the step that saw it and without a gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.layers.moe import MoEConfig
from moejax.routing.config import RouterConfig
from moejax.training.balance import balanced
from moejax.training.state import init_state, train_step
from tests.training.helpers import text_bytes, tiny_model, tiny_train

FAST = {"xla_backend_optimization_level": 0}


def test_the_busy_fall_and_the_idle_rise():
    bias = jnp.array([[0.5, 0.0, -0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    load = jnp.array([[7, 1, 0, 4], [2, 2, 2, 2]], jnp.int32)  # means 3 and 2
    want = [[0.4, 0.1, -0.4, -0.1], [0.0, 0.0, 0.0, 0.0]]
    np.testing.assert_allclose(balanced(bias, load, 0.1), want, atol=1e-7)


def test_an_unbalanced_router_is_evened_out_by_steps():
    router = RouterConfig(num_experts=4, top_k=1, score="sigmoid", correction_bias=True)
    model = tiny_model(moe=MoEConfig(d_ff=8, router=router))
    # Without a learning rate that matters and without losses, only the biases can even it out.
    cfg = tiny_train(
        learning_rate=1e-9, load_balancing_weight=0.0, bias_rate=0.02, batch_size=4, seq_len=32
    )
    state = init_state(model, cfg)
    tokens = text_bytes()[: 4 * 33].reshape(4, 33).astype(np.int32)
    lowered = train_step.lower(state, tokens, np.float32(0), model=model, cfg=cfg)
    step, imbalance = lowered.compile(FAST), []
    for _ in range(25):
        before = state.params.groups[0].mlp.router.correction_bias.copy()
        state, metrics = step(state, tokens, np.float32(0))
        imbalance.append(float(metrics.load_imbalance))
        moved = np.abs(state.params.groups[0].mlp.router.correction_bias - before)
        assert np.all(np.isclose(moved, 0.02, atol=1e-6) | (moved == 0)) and moved.any()
    assert imbalance[-1] < 0.6 * imbalance[0]
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    biases = [leaf for path, leaf in moments if "correction_bias" in jax.tree_util.keystr(path)]
    assert len(biases) == 2 and not any(np.any(leaf) for leaf in biases)
