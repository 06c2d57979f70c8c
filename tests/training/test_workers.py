"""Workers that reduce gradients are one data-parallel run; others hold models of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint import manager as checkpoints
from moejax.collectives.codecs import BlockQuant
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.layers.moe import MoEConfig
from moejax.models.decoder import init_decoder
from moejax.routing.config import RouterConfig
from moejax.sync.fragments import whole
from moejax.sync.plan import diloco
from moejax.sync.transform import reduce_gradients, synchronise
from moejax.training.state import init_state, train_step
from moejax.training.workers import (
    Exchange,
    consensus,
    init_workers,
    make_worker_step,
    worker_shardings,
)
from tests.training.helpers import text_bytes, tiny_model, tiny_train

EXPERTS = MoEConfig(d_ff=8, router=RouterConfig(num_experts=4, top_k=1, renormalize=False))
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
    state, nats = make_worker_step(MODEL, CFG, mesh, exchange)(state, tokens, HALF)
    want, metrics = train_step(one_device, tokens, HALF, model=MODEL, cfg=CFG)
    assert float(metrics.grad_norm) > CFG.clip_norm  # it is clipped
    assert nats.mean() == pytest.approx(float(metrics.cross_entropy), rel=1e-5)
    _assert_close(consensus(state), want.params, 2e-5)
    for leaf in jax.tree.leaves(state.params):
        np.testing.assert_array_equal(leaf[0], leaf[1])


@pytest.mark.full
def test_a_plan_is_carried_through_checkpoints_to_the_bit(tokens, tmp_path):
    """Outer weights, momentum and residuals come back; the next step is the same bits."""
    mesh = make_mesh(data=2)
    shapes = jax.eval_shape(lambda: init_decoder(jax.random.key(0), MODEL))
    plan = diloco(2, codec=BlockQuant(4, 16))
    exchange = Exchange(weights=synchronise(plan, whole(shapes), ("data",)))
    step = make_worker_step(MODEL, CFG, mesh, exchange)
    state = init_workers(MODEL, CFG, mesh, exchange)
    apart = []
    for _ in range(3):
        state, _ = step(state, tokens, HALF)
        apart.append(max(float(jnp.ptp(leaf, 0).max()) for leaf in jax.tree.leaves(state.params)))
    assert apart[0] > 1e-3 and apart[1] < 1e-6 and apart[2] > 1e-3
    shardings = worker_shardings(MODEL, CFG, mesh, exchange)
    abstract = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, shardings
    )
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, 3, params=state.params, optimizer={"state": state}, extra={})
        checkpoints.finish(manager)
        stored = {"optimizer": {"state": abstract}}
        again = checkpoints.restore(manager, 3, stored)["optimizer"]["state"]
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(again.weights_state)) > 0
    states = [step(one, tokens, HALF)[0] for one in (state, again)]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


def test_what_does_not_fit_is_refused():
    mesh = make_mesh(data=4, expert=2)
    with pytest.raises(InputError, match="batch_size=4 is not divisible by data . expert = 8"):
        make_worker_step(MODEL, CFG, mesh, Exchange())
    with pytest.raises(InputError, match="fully_sharded=True does not fit"):
        init_workers(MODEL, tiny_train(fully_sharded=True), mesh, Exchange())
