"""A run whose devices come and go is the run that kept them all.

First one process plays the part of `live_devices`. Then three processes, one of which dies at any
moment: the others go on, or end and say why. Ten moments are drawn from a seed, two of each kind.
The newest checkpoint must be whole and equal that of the unkilled run.
"""

import contextlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.fault_steps.moments import STEPS, draw_moments, run_moment, start
from experiments.fault_steps.problem import START, three, train_step, unkilled
from moejax.core.errors import InputError
from moejax.elastic.alive import AXIS, hand_over, run_alive
from moejax.elastic.watchdog import EXIT_STUCK


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
    events, steps, guarded = [], [], []
    live = Scripted([6, 6, 6, 3, 3, 2, 6], failing=(2,))

    @contextlib.contextmanager
    def guard():
        guarded.append("in")
        yield
        guarded.append("out")

    got = run_alive(
        jax.devices(), START, train_step, 8, live=live, guard=guard,
        notify=events.append, completed=lambda step, state: steps.append(step),
    )  # fmt: skip
    assert guarded == ["in", "out"] * 9  # eight steps, one of them twice
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


MOMENTS = draw_moments(0)
DEFAULT = [MOMENTS[0], MOMENTS[6]]  # in a step, and the coordinator in a save


def _assert_same(got, want):
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name], leaf, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "moment, victim",
    [pytest.param(*one, marks=[] if one in DEFAULT else [pytest.mark.full]) for one in MOMENTS],
)
def test_a_process_dies(tmp_path, moment, victim):
    found = run_moment(tmp_path, moment, victim)
    want, (step, saved) = unkilled(found.steps), found.saved
    _assert_same(saved, want[step])
    for index, output in found.outputs.items():
        if victim == 0:
            assert found.codes[index] not in (0, EXIT_STUCK), output
            assert "coordination service" in output.lower(), output
            continue
        assert found.codes[index] == 0, output
        _assert_same(found.results[index]["state"], want[-1])
        last = found.results[index]["events"][-1]
        assert last.kind == "members" and last.detail == "2 devices", output
    if victim == 0:
        # From the newest checkpoint on the run ends as it would have.
        last = run_alive(jax.devices(), saved, train_step, STEPS, first_step=step, live=three)
        _assert_same(last, want[-1])


@pytest.mark.full
def test_a_late_process_is_waited_for(tmp_path):
    """The others give up a collective with it, and the connections of that one are lost."""
    children, _ = start(tmp_path, STEPS, 0.0, {1: "late:3"})
    outputs = [child.communicate(timeout=240)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], outputs
    for index in range(3):
        result = pickle.loads((tmp_path / str(index)).read_bytes())
        _assert_same(result["state"], unkilled(STEPS)[STEPS])
        assert any(event.kind == "retry" for event in result["events"])
        assert result["events"][-1].detail == "3 devices"


@pytest.mark.full
def test_a_stuck_process_is_ended_and_the_others_go_on(tmp_path):
    children, _ = start(tmp_path, STEPS, 0.0, {1: "hang:3"})
    outputs = [child.communicate(timeout=240)[0] for child in children]
    assert [child.returncode for child in children] == [0, EXIT_STUCK, 0], outputs
    assert "no step for" in outputs[1]
    for index in (0, 2):
        result = pickle.loads((tmp_path / str(index)).read_bytes())
        _assert_same(result["state"], unkilled(STEPS)[STEPS])
