"""The loop trains workers that follow a plan, and continues them to the bit."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from moejax.checkpoint import manager as checkpoints
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.dispatch.config import DispatchConfig
from moejax.models.decoder import init_decoder
from moejax.sync.config import SyncConfig
from moejax.sync.fragments import size, whole
from moejax.sync.reduce import sent_bytes
from moejax.training.loop import train
from moejax.training.program import check_program, make_program, sync_bytes, weights
from moejax.training.sharding import state_shardings
from moejax.training.state import init_state
from tests.training.helpers import text_bytes, tiny_model, tiny_train

MODEL = tiny_model(num_layers=1)
CFG = tiny_train(batch_size=8, seq_len=2, horizon_steps=6, checkpoint_steps=3)
SYNC = SyncConfig(method="diloco", every=2, codec="int4", common_steps=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps, checkpoints after three and six; and the same from the first of them."""
    mesh, path = make_mesh(data=2, expert=2), tmp_path_factory.mktemp("sync")
    first = train(text_bytes(), MODEL, CFG, path=path / "a", mesh=mesh, sync=SYNC)
    shutil.copytree(path / "a" / "3", path / "b" / "3")
    again = train(text_bytes(), MODEL, CFG, path=path / "b", mesh=mesh, sync=SYNC)
    return first, again, path / "a"


def test_a_plan_continues_to_the_bit(run):
    first, again, _ = run
    assert (first.resumed_step, again.resumed_step) == (0, 3)
    for a, b in zip(*map(jax.tree.leaves, (first.state, again.state)), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in set(first.history) - {"elapsed_secs"}:
        np.testing.assert_array_equal(first.history[name], again.history[name])
    assert first.history["cross_entropy"][-1] < first.history["cross_entropy"][0]
    assert np.isfinite(list(first.history.values())).all()


def test_the_checkpoint_serves_the_mean_of_the_workers(run):
    first, _, path = run
    mesh, leaves = make_mesh(data=2, expert=2), jax.tree.leaves(first.state.params)
    # Step six ended a period: workers agree up to rounding, their outer weights to the bit.
    assert max(float(np.ptp(np.asarray(leaf), 0).max()) for leaf in leaves) < 1e-6
    for leaf in jax.tree.leaves(first.state.weights_state.inner.outer):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    shapes = jax.eval_shape(lambda: init_state(MODEL, CFG)).params
    where = state_shardings(shapes, mesh, CFG)
    wanted = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, where
    )
    with checkpoints.open_manager(path, read_only=True) as manager:
        params = checkpoints.restore(manager, 6, {"params": wanted})["params"]
    for a, b in zip(*map(jax.tree.leaves, (params, weights(first.state))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_plan_and_other_numbers_of_workers_are_refused(run):
    path = run[2]
    with pytest.raises(InputError, match="another run, sync: every=2, not 3"):
        sync = dataclasses.replace(SYNC, every=3)
        train(text_bytes(), MODEL, CFG, path=path, mesh=make_mesh(data=2), sync=sync)
    with pytest.raises(InputError, match=r"another run, sync: method='diloco', not 'none'"):
        train(text_bytes(), MODEL, CFG, path=path, mesh=make_mesh(data=2))
    with pytest.raises(InputError, match=r"is float32\[2,.*want float32\[4,"):
        train(text_bytes(), MODEL, CFG, path=path, mesh=make_mesh(data=4), sync=SYNC)


def test_bytes_of_a_device_are_those_of_its_shard():
    shapes = jax.eval_shape(lambda: init_decoder(jax.random.key(0), MODEL))
    n, cfg = size(shapes, whole(shapes)[0]), SyncConfig(method="local_sgd", every=2)
    assert sync_bytes(cfg, MODEL, CFG, make_mesh(data=4)) == sent_bytes(n, 4) / 2
    named = jax.tree_util.tree_leaves_with_path(shapes)
    experts = sum(leaf.size for path, leaf in named if "experts" in jax.tree_util.keystr(path))
    half = sent_bytes(n - experts // 2, 4) / 2
    assert sync_bytes(cfg, MODEL, CFG, make_mesh(data=4, expert=2)) == half


@pytest.mark.parametrize(
    "changes, sync, message",
    [
        (dict(fully_sharded=True), SYNC, "fully_sharded=True does not fit"),
        (dict(experts_memory="pinned_host"), SYNC, "experts_memory='pinned_host' does not fit"),
        (
            dict(dispatch=DispatchConfig(strategy="all_to_all", over_data=True)),
            SYNC,
            "over_data=False does",
        ),
        (dict(batch_size=3), SYNC, "batch_size=3 is not divisible by data . expert = 4 ranks"),
        (
            {},
            SyncConfig(method="streaming_diloco"),
            "count=2 must be between 1 and 1 fragments",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, sync, message):
    with pytest.raises(InputError, match=message):
        cfg = tiny_train(**dict(batch_size=8) | changes)
        check_program(make_mesh(data=2, expert=2), MODEL, cfg, sync)


def test_workers_want_a_mesh():
    with pytest.raises(InputError, match="sync.method='diloco' wants a mesh"):
        make_program(MODEL, CFG, None, SYNC)
