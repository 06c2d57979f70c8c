"""A run learns, resumes to the bit after SIGKILL, and refuses another run's checkpoints."""

import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.overlay import overlay
from moejax.training import loop
from tests.training.helpers import text_bytes, tiny_model, tiny_train


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, so that only the first child compiles."""
    return tmp_path_factory.mktemp("cache")


def child(path, moment, cache, *overrides):
    env = dict(
        os.environ,
        NPROC="16",
        JAX_PLATFORMS="cpu",
        JAX_COMPILATION_CACHE_DIR=str(cache),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    command = [sys.executable, "-m", "tests.training.child", str(path), moment, *overrides]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def finish(path, cache, *overrides):
    """Trains to the end in a child; returns the step that it resumed from."""
    done = child(path, "never", cache, *overrides)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """An uninterrupted run, read back from its last checkpoint, and its folder."""
    path = tmp_path_factory.mktemp("whole")
    assert finish(path, cache) == 0
    return loop.train(text_bytes(), tiny_model(), tiny_train(), path=path), path


def assert_same_run(got, want):
    assert jax.tree.structure(got.state) == jax.tree.structure(want.state)
    for a, b in zip(jax.tree.leaves(got.state), jax.tree.leaves(want.state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert set(got.history) == set(loop.COLUMNS)
    for name in set(loop.COLUMNS) - {"elapsed_secs"}:
        np.testing.assert_array_equal(got.history[name], want.history[name], err_msg=name)


def test_learns_and_keeps_the_metrics_of_every_step(whole):
    result, _ = whole
    history = result.history
    assert int(result.state.step) == 12 and len(history["loss"]) == 12
    assert {len(column) for column in history.values()} == {12}
    assert history["cross_entropy"][-1] < history["cross_entropy"][0] - 0.5
    assert (np.diff(history["elapsed_secs"]) > 0).all()
    assert (history["load_imbalance"] >= 1).all() and (history["load_imbalance"] <= 2).all()
    total = history["cross_entropy"] + 0.01 * history["load_balancing_loss"]
    np.testing.assert_allclose(history["loss"], total, rtol=1e-6)


def test_finished_run_returns_at_once(whole, monkeypatch):
    result, path = whole
    monkeypatch.setattr(loop, "_run", lambda *args: pytest.fail("trained again"))
    again = loop.train(text_bytes(), tiny_model(), tiny_train(), path=path)
    assert again.resumed_step == 12
    assert_same_run(again, result)


def checkpoints_in(path):
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit())


def test_killed_runs_continue_as_if_uninterrupted(whole, cache, tmp_path):
    # Before the first checkpoint; between checkpoints; while one is being written.
    for moment, complete in (("step:2:.", []), ("step:6:4", [4]), ("write:8", [4])):
        killed = child(tmp_path, moment, cache)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
        assert checkpoints_in(tmp_path) == complete
    assert list(tmp_path.glob("8.orbax-checkpoint-tmp*"))
    assert finish(tmp_path, cache) == 4
    assert checkpoints_in(tmp_path) == [8, 12]
    assert not list(tmp_path.glob("*tmp*"))
    assert_same_run(loop.train(text_bytes(), tiny_model(), tiny_train(), path=tmp_path), whole[0])


def test_time_horizon_anneals_and_carries_its_clock(cache, tmp_path):
    overrides = ("horizon_steps=None", "horizon_secs=0.5", "checkpoint_steps=None")
    assert finish(tmp_path, cache, *overrides) == 0
    cfg = overlay(tiny_train(), overrides)
    result = loop.train(text_bytes(), tiny_model(), cfg, path=tmp_path)
    lr, elapsed = result.history["learning_rate"], result.history["elapsed_secs"]
    assert result.resumed_step == len(lr) == int(result.state.step)
    assert elapsed[-1] >= 0.5 and len(lr) > 4
    assert 0.5e-2 < lr.max() <= 1e-2 and lr[-1] < 0.5 * lr.max()


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(cfg=tiny_train(seed=1)), "another run, train: seed=0, not 1"),
        (dict(model=tiny_model(norm_eps=1e-5)), "another run, model: norm_eps=1e-06, not 1e-05"),
        (dict(data=text_bytes()[:-1]), "was trained on other data"),
        (dict(data=text_bytes()[:9]), "9 training bytes, one batch wants 10"),
    ],
)
def test_refuses_another_run(whole, change, message):
    wanted = dict(data=text_bytes(), model=tiny_model(), cfg=tiny_train()) | change
    with pytest.raises(InputError, match=message) as error:
        loop.train(wanted["data"], wanted["model"], wanted["cfg"], path=whole[1])
    assert "\n" not in str(error.value)


def test_how_often_to_save_may_change(whole):
    result, path = whole
    again = loop.train(text_bytes(), tiny_model(), tiny_train(checkpoint_steps=1), path=path)
    assert_same_run(again, result)


def test_refuses_a_truncated_checkpoint(whole, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(whole[1], path)
    for file in (path / "12" / "optimizer").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(InputError, match=r"12: 'optimizer' is truncated or damaged"):
        loop.train(text_bytes(), tiny_model(), tiny_train(), path=path)
