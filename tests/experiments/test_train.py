"""A run of the training program: what it writes, and that several processes are the same run."""

import dataclasses
import functools
import json
import pathlib
import pickle
import struct

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments.train_steps.run import make_source, run
from moejax.checkpoint import manager as checkpoints
from moejax.core.mesh import make_mesh
from moejax.data.text import load_corpus
from moejax.training.run_log import COLUMNS
from moejax.training.state import init_state
from tests.experiments.train_steps.runs import CHILD, TINY, finish, start, tiny_run, write_text

HEARTBEAT_SECS = 3


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("run") / "text")


@functools.cache
def run_here(text, workdir):
    """Figures of the run by this process, or of the rest of it."""
    cfg = tiny_run(text)
    corpus = load_corpus(cfg.data)
    return run(cfg, cfg.model.decoder(), make_source(cfg, corpus), corpus.heldout.data, workdir)


def flags_of(text, workdir):
    return [*(f"--set={item}" for item in TINY), f"--data={text}", f"--workdir={workdir}"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fallen:
    """A run of two processes of which the second killed itself after its third step."""

    statuses: tuple[int, ...]
    outputs: tuple[str, ...]
    workdir: pathlib.Path
    params: dict  # at step 2, as the processes had them


@pytest.fixture(scope="module")
def fallen(text):
    workdir, file = text.parent / "two", text.parent / "params"
    # Evaluation compiles a program of its own, so it is left to the process that continues.
    flags = [*flags_of(text, workdir), "--set=eval_steps=9", f"--heartbeat_secs={HEARTBEAT_SECS}"]
    ended = finish(start(2, CHILD, ["train", str(file), *flags]))
    assert file.exists(), ended[0][1][-3000:]
    statuses, outputs = zip(*ended, strict=True)
    params = pickle.loads(file.read_bytes())
    return Fallen(statuses=statuses, outputs=outputs, workdir=workdir, params=params)


def test_a_process_that_dies_ends_the_others_with_a_message(fallen):
    survivor, victim = fallen.statuses
    assert victim == -9
    assert survivor not in (0, victim)
    assert "another task died" in fallen.outputs[0]


def test_checkpoints_hold_the_bits_of_all_processes(fallen, text):
    cfg, mesh = tiny_run(text), make_mesh()
    params = jax.eval_shape(lambda: init_state(cfg.model.decoder(), cfg.train)).params
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), params
    )
    with checkpoints.open_manager(fallen.workdir / "checkpoints", read_only=True) as manager:
        assert checkpoints.latest_step(manager) == 2
        restored = checkpoints.restore(manager, 2, {"params": wanted})["params"]
    assert jax.tree.structure(restored) == jax.tree.structure(fallen.params)
    jax.tree.map(np.testing.assert_array_equal, restored, fallen.params)


def test_the_run_continues_on_one_process_as_if_uninterrupted(fallen, text):
    whole, rest = run_here(text, text.parent / "one"), run_here(text, fallen.workdir)
    assert (whole["resumed_step"], rest["resumed_step"]) == (0, 2)
    # Two steps of two processes, then two of one, beside four of one.
    np.testing.assert_allclose(rest["cross_entropy"], whole["cross_entropy"], rtol=1e-6)
    np.testing.assert_allclose(rest["heldout_bits"], whole["heldout_bits"], rtol=1e-6)
    assert rest["expert_load"] == whole["expert_load"]
    assert len(whole["cross_entropy"]) == 4
    assert whole["cross_entropy"][-1] < whole["cross_entropy"][0]


def events(folder):
    """(step, value) of every event file in a folder, in the order of writing."""
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length, its checksum, the record, its checksum
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            yield from ((event.step, value) for value in event.summary.value)


def test_metrics_are_written_for_tensorboard(text):
    figures = run_here(text, text.parent / "one")
    values = {(step, one.tag): one for step, one in events(text.parent / "one" / "tensorboard")}
    for step in (1, 2, 3, 4):
        got = values[step, "train/cross_entropy"].simple_value
        np.testing.assert_allclose(got, figures["cross_entropy"][step - 1], rtol=1e-6)
        assert {f"train/{name}" for name in (*COLUMNS, "tokens_per_s")} <= {
            tag for at, tag in values if at == step
        }
        for axis, nbytes in figures["traffic"]["nbytes"].items():
            assert values[step, f"bytes/{axis}"].simple_value == nbytes
    assert figures["traffic"]["nbytes"]["expert"] > 0
    assert {step for step, tag in values if tag == "heldout/bits"} == {2, 4}
    load = values[4, "load/layer_0"].histo
    # Of the same weights as the final score, so the last histogram is the report's load.
    assert list(load.bucket) == figures["expert_load"][0] and load.num == sum(load.bucket)
    assert values[4, "load/all_layers"].image.width == 4


def test_only_the_first_process_writes_metrics(fallen, text):
    run_here(text, fallen.workdir)
    files = list((fallen.workdir / "tensorboard").iterdir())
    assert len(files) == 2  # of the two processes together, and of the one that continued


@pytest.mark.full
def test_four_processes_are_the_same_run(text, tmp_path):
    report = tmp_path / "report.json"
    flags = [*flags_of(text, tmp_path / "four"), f"--json={report}"]
    for status, output in finish(start(4, "experiments.train", flags)):
        assert status == 0, output[-3000:]
    whole, four = run_here(text, text.parent / "one"), json.loads(report.read_text())["figures"]
    assert four["num_processes"] == 4
    np.testing.assert_allclose(four["cross_entropy"], whole["cross_entropy"], rtol=1e-6)
    assert four["expert_load"] == whole["expert_load"] and four["traffic"] == whole["traffic"]
