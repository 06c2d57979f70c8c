"""A state saved on any mesh, its experts in either memory, restores on every other."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from moejax.checkpoint import manager as checkpoints
from moejax.core.memory import memory_kinds
from moejax.core.mesh import make_mesh
from moejax.layers.moe import MoEConfig
from moejax.routing.config import RouterConfig
from moejax.training.sharding import sharded_loss, state_shardings
from moejax.training.state import TrainState, init_state, train_step
from tests.training.helpers import text_bytes, tiny_model, tiny_train

EXPERTS = MoEConfig(d_ff=4, router=RouterConfig(num_experts=8, top_k=1, renormalize=False))
MODEL = tiny_model(moe=EXPERTS, num_layers=1)
CFG = tiny_train(batch_size=8, seq_len=1)
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
PLACES = list(itertools.product(MESHES, ("device", "pinned_host")))
LOSS = jax.jit(sharded_loss, static_argnums=(2, 3, 4))


def config(memory, mesh):
    return dataclasses.replace(CFG, experts_memory=memory, fully_sharded=mesh[0] == 4)


def placed(state, mesh, memory):
    """The state on another mesh."""
    where = make_mesh(data=mesh[0], expert=mesh[1])
    return jax.device_put(state, state_shardings(state, where, config(memory, mesh)))


@pytest.fixture(scope="module")
def state():
    """After a step, so that the optimizer has something to say."""
    state, _ = train_step(init_state(MODEL, CFG), tokens(), np.float32(0.5), MODEL, CFG)
    return jax.device_get(state)


def tokens():
    return text_bytes()[:16].reshape(8, 2).astype(np.int32)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A folder of checkpoints per place."""
    folders = {}
    for mesh, memory in PLACES:
        folder = tmp_path_factory.mktemp(f"{mesh[0]}_{mesh[1]}_{memory}")
        there = placed(state, mesh, memory)
        assert memory_kinds(there.params.groups[0].mlp.experts) == {memory}
        with checkpoints.open_manager(folder) as manager:
            optimizer = {"opt_state": there.opt_state, "step": there.step}
            checkpoints.save(manager, 1, params=there.params, optimizer=optimizer, extra={})
        folders[mesh, memory] = folder
    return folders


@pytest.mark.parametrize(("mesh", "memory"), PLACES)
def test_restores_bit_for_bit_from_every_place(mesh, memory, saved, state):
    where = make_mesh(data=mesh[0], expert=mesh[1])
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(state, where, config(memory, mesh)),
    )
    wanted = {
        "params": abstract.params,
        "optimizer": {"opt_state": abstract.opt_state, "step": abstract.step},
    }
    for folder in saved.values():
        with checkpoints.open_manager(folder, read_only=True) as manager:
            found = checkpoints.restore(manager, 1, wanted)
        restored = TrainState(params=found["params"], **found["optimizer"])
        assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(
            lambda leaf: leaf.sharding, abstract
        )
        for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(got, want)


def test_the_next_loss_is_the_same_on_every_mesh(state):
    losses = []
    for mesh in MESHES:
        where, cfg = make_mesh(data=mesh[0], expert=mesh[1]), config("device", mesh)
        params = placed(state, mesh, "device").params
        losses.append(LOSS(params, tokens(), MODEL, cfg, where)[0])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_experts_that_rest_in_host_memory_train_bit_for_bit_as_on_the_device(state):
    mesh, results = (4, 2), {}
    where = make_mesh(data=mesh[0], expert=mesh[1])
    train_step.clear_cache()
    for memory in ("device", "pinned_host"):
        here = placed(state, mesh, memory)
        for _ in range(2):
            cfg = config(memory, mesh)
            here, _ = train_step(here, tokens(), np.float32(0.5), MODEL, cfg, where)
        assert memory_kinds(here.params.groups[0].mlp.experts) == {memory}
        assert memory_kinds(here.opt_state[1].mu.groups[0].mlp.experts) == {memory}
        assert memory_kinds(here.params.embed) == {"device"}
        results[memory] = jax.device_get(here)
    assert train_step._cache_size() == 2  # one program each, whatever the number of steps
    for got, want in zip(*map(jax.tree.leaves, results.values()), strict=True):
        np.testing.assert_array_equal(got, want)
