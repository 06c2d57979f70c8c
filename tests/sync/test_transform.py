"""Plans against the equations of their papers, in numpy, worker by worker."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from moejax.aot.hlo import parse_hlo
from moejax.collectives.codecs import BlockQuant, TopK
from moejax.collectives.inspect import inspect_collectives
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.sync.fragments import Part, whole
from moejax.sync.plan import (
    Outer,
    SyncPlan,
    cd_sgd,
    diloco,
    local_sgd,
    partial_local_sgd,
    streaming_diloco,
)
from moejax.sync.transform import bytes_per_step, reduce_gradients, synchronise

W, N, STEPS, LR = 4, 24, 9, 0.1
TREE = {"a": jnp.zeros(N // 2), "b": jnp.zeros((2, N // 4))}
HALVES = ((Part(0),), (Part(1),))
OUTER = Outer(learning_rate=0.7, momentum=0.9)
PLANS = {
    "local": (local_sgd(3), whole(TREE)),
    "diloco": (diloco(3, OUTER), whole(TREE)),
    "dream": (partial_local_sgd([[0], [1, 2]], 3), HALVES),
    "streaming": (streaming_diloco(4, 2, OUTER, codec=None, keep_local=0.25), HALVES),
    "delayed": (cd_sgd(0.02, 3), whole(TREE)),
}


def _problem():
    """Curvatures and targets of each worker: they pull in different directions."""
    rng = np.random.default_rng(0)
    return (rng.uniform(0.5, 1.5, (W, N)), rng.standard_normal((W, N)))


def _two_bits(v, threshold):
    return np.where(v >= threshold, threshold, np.where(v <= -threshold, -threshold, 0))


def _two_bit_sum(wanted, threshold):
    """What all get, and what each sent of it: chunk c is summed, and coded again, by worker c."""
    sent, total = _two_bits(wanted, threshold), np.zeros(N)
    for c, chunk in enumerate(np.arange(N).reshape(W, -1)):
        arrived = sent[:, chunk].sum(0) + wanted[c, chunk] - sent[c, chunk]
        total[chunk] = _two_bits(arrived, W * threshold)
        sent[c, chunk] = wanted[c, chunk] - (arrived - total[chunk])
    return total, sent


def _by_equations(name):
    """Weights [STEPS, W, N] of every worker after every step."""
    curvature, target = _problem()
    p, outer = np.zeros((W, N)), np.zeros(N)
    momentum, residual = np.zeros(N), np.zeros((W, N))
    history = []
    halves = np.arange(N) < N // 2, np.arange(N) >= N // 2
    for step in range(STEPS):
        u = -LR * curvature * (p - target)
        if name == "local":
            p = p + u
            if step % 3 == 2:
                p = np.broadcast_to(p.mean(0), p.shape)
        elif name == "diloco":
            p = p + u
            if step % 3 == 2:
                gradient = outer - p.mean(0)
                momentum = 0.9 * momentum + gradient
                outer = outer - 0.7 * (gradient + 0.9 * momentum)
                p = np.broadcast_to(outer, p.shape)
        elif name == "dream":
            first, second = step % 3 == 0, step % 3 > 0
            due = halves[0] * first + halves[1] * second > 0
            p = np.where(due, p.mean(0), p) + u
        elif name == "streaming":
            due = halves[0] if step % 4 == 0 else halves[1] if step % 4 == 2 else halves[0] & False
            gradient = outer - p.mean(0)
            new = 0.9 * momentum + gradient
            momentum = np.where(due, new, momentum)
            outer = np.where(due, outer - 0.7 * (gradient + 0.9 * new), outer)
            p = np.where(due, 0.25 * p + 0.75 * outer, p) + u
        else:
            # What the last step moved arrives now, coded; the step's own update comes on top.
            wanted = (outer - p) + residual
            exact = step % 3 == 0
            total, sent = (wanted.sum(0), wanted) if exact else _two_bit_sum(wanted, 0.02)
            residual = wanted - sent
            outer = outer - total / W
            p = outer + u
        history.append(p)
    return np.stack(history)


def _worker_update(tx, grads, state, params):
    """One worker's step; every leaf has a leading axis of one worker here."""
    grads, state, params = jax.tree.map(lambda leaf: leaf[0], (grads, state, params))
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return jax.tree.map(lambda leaf: leaf[None], (params, state))


def _over_workers(tx, mesh):
    body, spec = partial(_worker_update, tx), P("data")
    return jax.shard_map(body, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)


def _stacked(tree):
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * W), tree)


def _flat(tree):
    return np.concatenate([np.asarray(leaf).reshape(W, -1) for leaf in jax.tree.leaves(tree)], 1)


@pytest.fixture(scope="module")
def runs():
    """Weights [STEPS, W, N] by plan, all plans in one program; and the outer weights at the end."""
    mesh = make_mesh(data=W)
    curvature, target = (
        {"a": jnp.asarray(x[:, : N // 2], jnp.float32),
         "b": jnp.asarray(x[:, N // 2 :].reshape(W, 2, -1), jnp.float32)}
        for x in _problem()
    )  # fmt: skip
    chains = {
        name: optax.chain(optax.sgd(LR), synchronise(plan, fragments, ("data",)))
        for name, (plan, fragments) in PLANS.items()
    }

    @jax.jit
    def step(states):
        results = {}
        for name, (params, state) in states.items():
            pulls = jax.tree.map(lambda c, p, t: c * (p - t), curvature, params, target)
            results[name] = _over_workers(chains[name], mesh)(pulls, state, params)
        return results

    states = {name: (_stacked(TREE), _stacked(tx.init(TREE))) for name, tx in chains.items()}
    history = {name: [] for name in PLANS}
    for _ in range(STEPS):
        states = step(states)
        for name, (params, _) in states.items():
            history[name].append(_flat(params))
    outer = {name: _flat(s[1].outer) for name, (_, s) in states.items() if s[1].outer is not None}
    return {name: np.stack(rows) for name, rows in history.items()}, outer


@pytest.mark.parametrize("name", PLANS)
def test_plans_follow_their_equations(runs, name):
    got, want = runs[0][name], _by_equations(name)
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert np.abs(want[0] - want[0][:1]).max() > 0.01  # workers do differ


def test_outer_weights_are_the_same_bits(runs):
    assert set(runs[1]) == {"diloco", "streaming", "delayed"}
    for outer in runs[1].values():
        assert (outer == outer[0]).all() and np.abs(outer).max() > 0.1


def test_only_what_is_due_travels_and_only_over_replicas():
    """Bytes of a period from the compiled program, on a mesh where experts are sharded too."""
    mesh = make_mesh(data=2, expert=4)
    tree = {"dense": jnp.zeros((64,)), "experts": jnp.zeros((2, 96))}
    fragments = ((Part(0), Part(1, (0,))), (Part(1, (1,)),))
    tx = synchronise(streaming_diloco(4, 2, codec=BlockQuant(8, 16)), fragments, ("data",))
    specs = {"dense": P("data"), "experts": P("data", None, "expert")}
    local = {"dense": tree["dense"], "experts": tree["experts"][:, :24]}
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), tree)
    states = jax.eval_shape(tx.init, tree)
    like = jax.tree.structure(tree)
    where = jax.tree.map(
        lambda part: specs if jax.tree.structure(part) == like else P("data"),
        states, is_leaf=lambda part: jax.tree.structure(part) == like,
    )  # fmt: skip
    body = partial(_worker_update, tx)
    run = jax.shard_map(
        body, mesh=mesh, in_specs=(specs, where, specs), out_specs=(specs, where), check_vma=False
    )
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), tx.init(tree))
    compiled = jax.jit(run).lower(stacked, state, stacked).compile()
    found = inspect_collectives(parse_hlo(compiled.as_text()), mesh)
    assert {axis for _, axis in found.traffic} == {"data"}
    # Two workers: half of a fragment there, half of the sum back; per expert rank and worker.
    sizes = [64 + local["experts"][0].size, local["experts"][1].size]
    halves = [BlockQuant(8, 16).nbytes(n // 2, 4) for n in sizes]
    assert sum(t.nbytes for t in found.traffic.values()) == 8 * 2 * sum(halves)


def test_bytes_per_step_are_those_of_the_reductions():
    def of(name, workers=W):
        plan, fragments = PLANS[name]
        return bytes_per_step(plan, fragments, TREE, workers)

    dense = 2 * 3 / 4 * 4 * N
    assert of("local") == of("diloco") == pytest.approx(dense / 3)
    assert of("dream") == pytest.approx(1.5 * dense / 3)  # one half twice in three steps
    assert of("streaming") == pytest.approx(dense / 4)
    assert of("delayed") == pytest.approx(dense / 3 + 2 / 3 * 6 * 2)  # chunks of 6 weights


def test_coded_gradients_are_fed_back():
    mesh = make_mesh(data=W)
    grads = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((W, N)), jnp.float32)}
    codecs = {"plain": None, "top-k": TopK(2, 32), "lossy": TopK(2, 32)}
    chains = {k: reduce_gradients(("data",), c, k != "lossy") for k, c in codecs.items()}
    zero = {"w": jnp.zeros(N)}
    states = {k: (_stacked(zero), _stacked(tx.init(zero))) for k, tx in chains.items()}

    @jax.jit
    def step(states):
        return {k: _over_workers(tx, mesh)(grads, *states[k][::-1]) for k, tx in chains.items()}

    for _ in range(60):
        states = step(states)
    assert states["plain"][1] is None and states["lossy"][1] is None
    mean = np.asarray(grads["w"]).mean(0)
    exact, fed, lossy = (np.asarray(states[k][0]["w"]) / 60 for k in ("plain", "top-k", "lossy"))
    np.testing.assert_allclose(exact, np.broadcast_to(mean, exact.shape), atol=1e-5)
    assert (fed == fed[0]).all() and np.abs(fed[0] - mean).max() < 0.2
    assert np.abs(lossy[0] - mean).max() > 2 * np.abs(fed[0] - mean).max()


def test_what_does_not_match_is_refused():
    with pytest.raises(InputError, match="the plan has 1 fragments, the weights 2"):
        synchronise(local_sgd(2), HALVES, ("data",))
    plan = SyncPlan(when=((0,), (1,)), period=2)
    with pytest.raises(InputError, match="leaf 0 is in fragments 0 and 1"):
        synchronise(plan, (HALVES[0], HALVES[0]), ("data",)).init(TREE)
    tx = synchronise(plan, HALVES, ("data",))
    with pytest.raises(InputError, match="a sync plan wants the weights"):
        tx.update(TREE, tx.init(TREE))
