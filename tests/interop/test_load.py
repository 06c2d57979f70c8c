"""One call to a model that can be served; to a checkpoint of moejax and back."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from moejax.core import ram
from moejax.core.errors import InputError
from moejax.core.memory import memory_kinds
from moejax.core.mesh import make_mesh
from moejax.experts.quantize import quantize_experts
from moejax.interop import load as interop_load
from moejax.interop.convert import write_checkpoint, write_folder
from moejax.interop.hf import load as hf_load
from moejax.interop.hf.load import load_folder
from moejax.interop.hf.tensors import SINGLE
from moejax.interop.load import load, open_source, read_model
from moejax.models.restore import restore_params
from tests.interop.hf.cases import SHAPES
from tests.interop.hf.models import Case, write_model

# Groups: one of MoE layers; a dense one before it; a cycle of two.
MODELS = {"olmoe": "plain", "qwen3_moe": "head_dim", "gpt_oss": "cycle"}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def write(model_type):
        folder = tmp_path_factory.mktemp(model_type)
        fields = json.dumps(SHAPES[model_type][MODELS[model_type]])
        write_model(Case(model_type, "source", fields), folder)
        return folder

    return write


def assert_same(got, want):
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))  # noqa: E731
    jax.tree.map(same, got, want)


def test_without_a_budget_experts_are_on_the_device(folder_of):
    model = load(folder_of("olmoe"))
    assert model.offload is None and memory_kinds(model.experts) == {"device"}
    assert model.context == model.capacity == 128


def test_a_budget_is_solved_to_slots(folder_of):
    half = load(folder_of("olmoe"), budget="50%", capacity=64)
    assert memory_kinds(half.experts) == {"pinned_host"}
    assert half.offload.num_slots == 2 * 8 // 2 - 1  # one lands
    more = load(folder_of("olmoe"), budget="50%", capacity=64, lanes=2)
    assert (more.offload.num_slots, more.offload.prefetch_lanes) == (5, 2)
    fits = load(folder_of("olmoe"), budget="1GiB", capacity=64)
    assert fits.offload.num_slots == 16
    with pytest.raises(InputError, match="predictor 1073741824"):
        load(folder_of("olmoe"), budget="1GiB", capacity=64, predictor_bytes=2**30)


def test_too_little_host_memory_is_said_before_reading(folder_of, tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemAvailable: 8 kB\n")
    monkeypatch.setattr(ram, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(interop_load, "read_model", None)
    with pytest.raises(InputError, match=r"host memory is too small .* 8192 are .* are missing"):
        load(folder_of("olmoe"), budget="50%", capacity=64)


@pytest.mark.parametrize("kind", ["safetensors", "moejax"])
def test_a_source_is_read_once(folder_of, tmp_path, monkeypatch, kind):
    """Config and headers are read when it is opened: afterwards only weights are."""
    folder = folder_of("olmoe")
    if kind == "moejax":
        write_checkpoint(load_folder(folder, mesh=make_mesh()), tmp_path / "moejax")
        folder = tmp_path / "moejax"
    want = load(folder, dtype="float32")
    source = open_source(folder, dtype="float32")
    assert (source.cfg, source.context) == (want.cfg, want.context)
    for module in (hf_load, interop_load):
        monkeypatch.setattr(module, "open_model", None)
    monkeypatch.setattr(interop_load, "read_model_config", None)
    assert_same(load(source).params, want.params)
    with pytest.raises(InputError, match="dtype=bfloat16 of .*, which was opened as float32"):
        load(source, dtype="bfloat16")


def test_a_budget_counts_quantised_bytes(folder_of):
    """One slot per layer is the least: what is too small for whole experts is ample for int4."""
    expert = 3 * 32 * 24 * 4
    fixed = load(folder_of("olmoe"), budget="1GiB", capacity=8)
    dense = sum(leaf.nbytes for leaf in jax.tree.leaves(fixed.params))
    with pytest.raises(InputError, match=f"the minimum is .* experts of {expert}"):
        load(folder_of("olmoe"), budget=f"{dense + 3 * expert}B", capacity=8)
    small = load(
        folder_of("olmoe"), budget=f"{dense + 3 * expert}B", capacity=8, experts_dtype="int4"
    )
    assert small.offload.num_slots >= 2 and memory_kinds(small.experts) == {"pinned_host"}


@pytest.mark.parametrize("model_type", MODELS)
def test_to_a_checkpoint_and_back(folder_of, tmp_path, model_type):
    """The same weights on another mesh, and the very same file from the checkpoint.

    Quantised as they are read from either, the experts are what they are quantised afterwards.
    """
    source = folder_of(model_type)
    model = load_folder(source, mesh=make_mesh())
    arrays = write_checkpoint(model, tmp_path / "moejax")
    assert write_checkpoint(model, tmp_path / "moejax") == arrays  # it is there already
    with pytest.raises(InputError, match="moejax: it holds a checkpoint of another model"):
        write_checkpoint(dataclasses.replace(model, context=7), tmp_path / "moejax")
    with pytest.raises(InputError, match="holds a config.json, which would hide the checkpoint"):
        write_checkpoint(model, source)
    again = read_model(tmp_path / "moejax", mesh=make_mesh(expert=2))
    assert memory_kinds(again.experts) == {"pinned_host"}
    assert_same((again.params, again.experts), (model.params, model.experts))
    assert (again.cfg, again.context) == (model.cfg, model.context)
    for folder in (source, tmp_path / "moejax"):
        quantized = read_model(folder, mesh=make_mesh(), experts_dtype="int4").experts
        assert_same(quantized, quantize_experts(model.experts, "int4"))
        assert memory_kinds(quantized) == {"pinned_host"}
    whole, cfg = restore_params(tmp_path / "moejax", mesh=make_mesh())
    assert cfg == model.cfg and len(jax.tree.leaves(whole)) == arrays
    tensors = load_file(source / SINGLE)
    assert write_folder(again, tmp_path / "hf") == len(tensors)
    assert_same(load_file(tmp_path / "hf" / SINGLE), tensors)


def test_an_export_that_was_stopped_goes_on(folder_of, tmp_path, monkeypatch):
    """Two files are complete; the third is begun again, and the result is the same."""
    from moejax.interop.hf import export

    model = load_folder(folder_of("olmoe"), mesh=make_mesh())
    written = []
    add = export.Writer.add

    def stop(self, name, array):
        written.append(name)
        if len(written) == 30:
            raise KeyboardInterrupt
        add(self, name, array)

    monkeypatch.setattr(export.Writer, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        export.save_folder(model, tmp_path, max_shard_bytes=30_000)
    assert not (tmp_path / "config.json").exists()
    complete = sorted(tmp_path.glob("*.part"))
    assert len(complete) >= 2
    seen = len(written)
    names = export.save_folder(model, tmp_path, max_shard_bytes=30_000)
    assert 0 < len(written) - seen < len(names)  # what was complete is not written again
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= load_file(path)
    assert_same(found, load_file(folder_of("olmoe") / SINGLE))
    with pytest.raises(InputError, match="holds a checkpoint; choose another folder"):
        export.save_folder(model, tmp_path)


def test_wrong_input_is_one_line(folder_of, tmp_path):
    olmoe = folder_of("olmoe")
    quantized = load_folder(olmoe, mesh=make_mesh(), experts_dtype="fp8")
    cases = [
        (lambda: load(tmp_path / "none"), "none does not exist"),
        (lambda: load(tmp_path), "has neither a config.json nor checkpoints of moejax"),
        (lambda: load(olmoe, capacity=129), "129 positions exceed the 128 of the model's context"),
        (lambda: load(olmoe, budget="20KiB", capacity=8), "20480 bytes is too small; the minimum"),
        (lambda: load(olmoe, budget="many"), "'many' is not like 8GiB"),
        (lambda: load(olmoe, batch=0), "batch=0 must be at least 1"),
        (lambda: load(olmoe, experts_dtype="int2"), "'int2' is not one of int8, int4, fp8"),
        (lambda: write_folder(quantized, tmp_path / "a"), "experts were quantised when they were"),
        (lambda: write_checkpoint(quantized, tmp_path / "a"), "experts were quantised when they"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
