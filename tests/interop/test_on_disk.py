"""Experts in a folder are the bits that loading gives, written once, of one model only."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.interop.convert import write_checkpoint
from moejax.interop.hf import load as hf_load
from moejax.interop.hf.load import load_folder
from moejax.interop.hf.tensors import SINGLE
from moejax.interop.load import load
from tests.interop.hf.cases import SHAPES
from tests.interop.hf.models import Case, write_model

# Groups: one of MoE layers; a dense one before it; a cycle of two, with biases.
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


def on_disk(source, folder, **options):
    return load(source, budget="50%", capacity=8, experts_on_disk=folder, **options)


def assert_same(model, want):
    """The weights of a loaded model and those of `load_folder`, bit by bit."""
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))  # noqa: E731
    jax.tree.map(same, model.params, want.params)
    layers, experts = want.experts.w_gate.shape[:2]
    for layer in range(layers):
        for expert in range(experts):
            row = jax.tree.map(lambda leaf, at=(layer, expert): leaf[at], want.experts)
            jax.tree.map(same, model.experts.row(layer * experts + expert), row)


@pytest.mark.parametrize("model_type", MODELS)
def test_what_is_on_disk_is_what_is_loaded(folder_of, tmp_path, model_type):
    source, seen = folder_of(model_type), []
    model = on_disk(source, tmp_path, progress=lambda *args: seen.append(args))
    want = load_folder(source, mesh=make_mesh())
    assert_same(model, want)
    assert seen[-1] == (want.nbytes, want.nbytes)
    assert model.offload is not None and jax.tree.leaves(model.experts) == []


def test_experts_are_written_once(folder_of, tmp_path, monkeypatch):
    """A run that was stopped in the second layer reads the first one no more."""
    source, put, read = folder_of("olmoe"), hf_load._put, []
    want = load_folder(source, mesh=make_mesh())

    def stop(piece, tensor, sinks):
        read.append(piece.name)
        if "layers.1.mlp.experts.3" in piece.name:
            raise KeyboardInterrupt
        return put(piece, tensor, sinks)

    monkeypatch.setattr(hf_load, "_put", stop)
    with pytest.raises(KeyboardInterrupt):
        on_disk(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["experts-00000.safetensors"]
    assert any("layers.0.mlp.experts" in name for name in read)
    read.clear()
    monkeypatch.setattr(hf_load, "_put", lambda *args: (read.append(args[0].name), put(*args))[1])
    assert_same(on_disk(source, tmp_path), want)
    assert any("layers.1.mlp.experts" in name for name in read)
    assert not any("layers.0.mlp.experts" in name for name in read)
    read.clear()
    on_disk(source, tmp_path)
    assert read and not any("experts" in name for name in read)


def test_quantised_rows(folder_of, tmp_path):
    source = folder_of("olmoe")
    model = on_disk(source, tmp_path, experts_dtype="int4", mesh=make_mesh(expert=2))
    assert_same(model, load_folder(source, mesh=make_mesh(), experts_dtype="int4"))


def test_of_a_checkpoint_of_moejax(folder_of, tmp_path):
    want = load_folder(folder_of("gpt_oss"), mesh=make_mesh())
    write_checkpoint(want, tmp_path / "moejax")
    for _ in range(2):  # written, then opened
        assert_same(on_disk(tmp_path / "moejax", tmp_path / "experts"), want)


def test_wrong_folders_are_one_line(folder_of, tmp_path):
    source, tuned = folder_of("olmoe"), tmp_path / "tuned"
    on_disk(source, tmp_path / "experts")
    shutil.copytree(source, tuned)
    tensors = load_file(source / SINGLE)
    name = next(name for name in tensors if "experts" in name)
    save_file(tensors | {name: tensors[name] + 1}, tuned / SINGLE)
    (tmp_path / "cut").mkdir()
    half = (tmp_path / "experts" / "experts-00001.safetensors").read_bytes()[:9000]
    (tmp_path / "cut" / "experts-00001.safetensors").write_bytes(half)
    cases = [
        (lambda: on_disk(tuned, tmp_path / "experts"), "was made for model"),
        (lambda: on_disk(folder_of("gpt_oss"), tmp_path / "experts"), "holds other experts"),
        (lambda: on_disk(source, tmp_path / "cut"), "experts-00001.safetensors is truncated"),
        (lambda: on_disk(source, source), "holds no experts but"),
        (lambda: on_disk(source, tmp_path / "experts", dtype="bfloat16"), "want bfloat16"),
        (lambda: on_disk(source, tmp_path / "experts", experts_dtype="int8"), "w_gate.q is not th"),
        (lambda: load(source, experts_on_disk=tmp_path), "experts on disk want a device budget"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
