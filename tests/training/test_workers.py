"""Workers that reduce gradients are one data-parallel run; others hold models of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.layers.moe import MoEConfig
from moejax.routing.config import RouterConfig
from moejax.sync.transform import reduce_gradients
from moejax.training.state import init_state, train_step
from moejax.training.workers import (
    Exchange,
    consensus,
    init_workers,
    make_worker_step,
)
from tests.training.helpers import text_bytes, tiny_model, tiny_train

# Biases move with the load of all workers.
ROUTER = RouterConfig(num_experts=4, top_k=1, renormalize=False, correction_bias=True)
EXPERTS = MoEConfig(d_ff=8, router=ROUTER)
MODEL = tiny_model(num_layers=1, moe=EXPERTS)
# Balance is a product of means over tokens, so a worker's differs; the rest is a mean of means.
CFG = tiny_train(batch_size=4, seq_len=2, load_balancing_weight=0.0, clip_norm=0.5)
HALF = np.float32(0.5)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(text_bytes()[: 4 * 3].reshape(4, 3), jnp.int32)


def _assert_close(got, want, atol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol)


def test_workers_with_one_gradient_are_one_run(tokens):
    mesh, one_device = make_mesh(data=2, expert=2), init_state(MODEL, CFG)
    exchange = Exchange(gradients=reduce_gradients(("data",)))
    state = init_workers(MODEL, CFG, mesh, exchange)
    _assert_close(consensus(state), one_device.params, 0)
    state, got = make_worker_step(MODEL, CFG, mesh, exchange)(state, tokens, HALF)
    want, metrics = train_step(one_device, tokens, HALF, model=MODEL, cfg=CFG)
    assert float(metrics.grad_norm) > CFG.clip_norm  # it is clipped
    # Each worker has a balance of its own; all else is a mean of means.
    for name in set(got.__dict__) - {"load_balancing_loss", "load_imbalance"}:
        want_value = getattr(metrics, name)
        np.testing.assert_allclose(got.__dict__[name], want_value, rtol=1e-5, err_msg=name)
    assert float(got.load_imbalance) >= float(metrics.load_imbalance) >= 1
    _assert_close(consensus(state), want.params, 2e-5)
    for leaf in jax.tree.leaves(state.params):
        np.testing.assert_array_equal(leaf[0], leaf[1])


def test_what_does_not_fit_is_refused():
    mesh = make_mesh(data=4, expert=2)
    with pytest.raises(InputError, match="batch_size=4 is not divisible by data . expert = 8"):
        make_worker_step(MODEL, CFG, mesh, Exchange())
    with pytest.raises(InputError, match="fully_sharded=True does not fit"):
        init_workers(MODEL, tiny_train(fully_sharded=True), mesh, Exchange())
