"""A run whose devices come and go is the run that kept them all.

One process plays the part of `live_devices`; `processes_child` is the same with processes.
"""

import contextlib
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.elastic.alive import AXIS, hand_over, run_alive
from tests.elastic.problem import START, train_step

ROOT = pathlib.Path(__file__).parents[2]


class Scripted:
    """Yields so many devices in each entry; raises in the entries named, after the step has run."""

    def __init__(self, counts, failing=()):
        self.counts, self.failing, self.entry, self.devices = counts, failing, -1, {}

    @contextlib.contextmanager
    def __call__(self, devices):
        self.entry += 1
        count = self.counts[min(self.entry, len(self.counts) - 1)]
        yield devices[:count]
        if self.entry in self.failing:
            raise RuntimeError("Devices failed\nmore")


@pytest.fixture(scope="module")
def whole():
    return run_alive(jax.devices(), START, train_step, 8, live=Scripted([6]))


def test_shrinking_and_growing_changes_nothing(whole):
    events, steps = [], []
    live = Scripted([6, 6, 6, 3, 3, 2, 6], failing=(2,))
    got = run_alive(
        jax.devices(), START, train_step, 8, live=live,
        notify=events.append, completed=lambda step, state: steps.append(step),
    )  # fmt: skip
    assert steps == list(range(1, 9))
    assert [(e.step, e.kind) for e in events] == [
        (0, "members"), (2, "retry"), (2, "members"), (4, "members"), (5, "members"),
    ]  # fmt: skip
    assert events[1].detail == "RuntimeError: Devices failed"
    for a, b in zip(*map(jax.tree.leaves, (got, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert np.abs(got["w"] - START["w"]).max() > 0.1


def test_a_step_that_always_fails_ends_the_run():
    def broken(mesh, state, step):
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        run_alive(jax.devices(), START, broken, 1, live=Scripted([2]), max_failures=3)
    with pytest.raises(InputError, match="num_steps=-1"):
        run_alive(jax.devices(), START, broken, -1)


def test_state_is_handed_over_to_the_bit():
    state = {
        "w": np.float32([np.nan, -0.0, 1e-40]),
        "b": np.asarray(jnp.ones(3, jnp.bfloat16)),
        "n": np.int32(3),
    }
    done, got = hand_over(make_mesh_of(3), 5, state)
    assert done == 5
    for a, b in zip(*map(jax.tree.leaves, (got, state)), strict=True):
        assert a.tobytes() == b.tobytes() and a.dtype == b.dtype and a.shape == b.shape


def make_mesh_of(count):
    return jax.sharding.Mesh(np.array(jax.devices()[:count]), (AXIS,))


def test_the_problem_is_a_function_of_the_batch_only():
    two, three = (train_step(make_mesh_of(n), START, 0) for n in (2, 3))
    np.testing.assert_allclose(two["w"], three["w"], rtol=1e-6)


def _child(port, index, *arguments):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
    command = [sys.executable, "-m", "tests.elastic.processes_child", str(port), str(index)]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


# Where process 2 dies: before its first step; in a step, before and after the others could finish
# it; and where it is started again.
MOMENTS = [("in:2", False), ("start", False), ("after:4", False), ("in:3", True), ("after:1", True)]


@pytest.mark.parametrize(
    "moment, again",
    [pytest.param(*one, marks=[] if one in MOMENTS[:1] else [pytest.mark.full]) for one in MOMENTS],
)
def test_processes_go_on_without_the_one_that_died(tmp_path, moment, again):
    """Of three processes one is killed; the others end with the weights of an unkilled run."""
    steps, port = 60 if again else 8, _free_port()
    pause = 0.5 if again else 0.0
    files = [tmp_path / str(i) for i in range(3)]
    children = [
        _child(port, i, files[i], steps, pause, moment if i == 2 else "never") for i in range(3)
    ]
    assert children[2].wait(120) == -signal.SIGKILL
    if again:
        children[2] = _child(port, 2, files[2], steps, pause, "never")
    outputs = [child.communicate(timeout=240)[0] for child in children]
    staying = children if again else children[:2]
    assert [child.returncode for child in staying] == [0] * len(staying), outputs
    want = run_alive(jax.devices(), START, train_step, steps, live=Scripted([3]))
    results = [pickle.loads(file.read_bytes()) for file in files[: len(staying)]]
    for result in results:
        for name, leaf in want.items():
            np.testing.assert_allclose(result["state"][name], leaf, rtol=1e-5, atol=1e-6)
        last = result["events"][-1]
        assert last.kind == "members" and last.detail == f"{len(staying)} devices", outputs
    lost = results[0]["events"]
    assert any(e.kind == "retry" for e in lost) or moment == "start", lost
    # No step takes longer than it takes to notice, and to start again.
    assert again or max(results[0]["seconds"][1:]) < 20
