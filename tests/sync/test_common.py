"""Workers that begin synchronously are one run, then a run of their plan from those weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.sync.common import after_common_steps
from moejax.sync.exchange import Exchange
from moejax.sync.fragments import whole
from moejax.sync.plan import Outer, diloco
from moejax.sync.transform import synchronise

W, N, LR, START, STEPS = 4, 6, 0.1, 3, 8
TREE = {"w": jnp.zeros(N)}
TARGETS = np.random.default_rng(0).standard_normal((W, N)).astype(np.float32)


def _run(exchange, first, last, weights):
    """Weights [W, N] after each step; gradients are w - target."""

    def body(target, state, params):
        target, state, params = jax.tree.map(lambda leaf: leaf[0], (target, state, params))
        grads, before = exchange.gradients.update({"w": params["w"] - target}, state[0], params)
        updates = jax.tree.map(lambda g: -LR * g, grads)
        updates, after = exchange.weights.update(updates, state[1], params)
        new = (before, after), optax.apply_updates(params, updates)
        return jax.tree.map(lambda leaf: leaf[None], new)

    spec = P("data")
    step = jax.jit(
        jax.shard_map(body, mesh=make_mesh(data=W), in_specs=(spec,) * 3, out_specs=(spec,) * 2)
    )
    one = {"w": jnp.asarray(weights[0])}
    states = exchange.gradients.init(one), exchange.weights.init(one)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * W), states)
    params, history = {"w": jnp.asarray(weights)}, []
    for _ in range(first, last):
        states, params = step(TARGETS, states, params)
        history.append(np.asarray(params["w"]))
    return np.stack(history)


def test_a_start_in_common_then_the_plan():
    plan = diloco(2, Outer(learning_rate=0.7, momentum=0.9))
    local = Exchange(weights=synchronise(plan, whole(TREE), ("data",)))
    got = _run(after_common_steps(local, START, ("data",)), 0, STEPS, np.zeros((W, N), np.float32))
    want, w = [], np.zeros(N, np.float32)
    for _ in range(START):
        w = w - LR * (w - TARGETS.mean(0))
        want.append(np.broadcast_to(w, (W, N)))
    np.testing.assert_allclose(got[:START], want, atol=1e-6)
    rest = _run(local, START, STEPS, np.asarray(got[START - 1]))
    np.testing.assert_allclose(got[START:], rest, atol=1e-6)
    assert np.ptp(got[START], axis=0).max() > 0.01 > np.ptp(got[START - 1], axis=0).max()


def test_no_steps_are_no_start():
    with pytest.raises(InputError, match="steps=0 must be at least 1"):
        after_common_steps(Exchange(), 0, ("data",))
