"""Files of experts: what is written is what rows are, and wrong folders end in one line."""

import dataclasses
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.safetensors import read, read_header
from moejax.experts.gated import init_experts
from moejax.experts.quantize import quantize_experts
from moejax.offload.disk import make_folder, missing_layers, open_experts
from tests.offload.on_disk import MODEL, on_disk, shapes_like, write

L, E = 2, 4


@pytest.fixture(scope="module")
def experts():
    key = jax.random.key(0)
    return init_experts(key, (L, E), 8, 24, out_scale=1.0, dtype=jnp.float32, bias=True)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4"])
def test_rows_are_the_experts_bits(experts, tmp_path, kind):
    if kind == "int4":
        experts = quantize_experts(experts, "int4")
    else:
        experts = jax.tree.map(lambda leaf: leaf.astype(kind), experts)
    opened = on_disk(tmp_path / "new" / "folder", experts)
    for granule in range(L * E):
        want = jax.tree.map(lambda leaf, g=granule: np.asarray(leaf[g // E, g % E]), experts)
        jax.tree.map(np.testing.assert_array_equal, opened.row(np.int32(granule)), want)
    assert jax.tree.leaves(opened) == []  # no array of it enters a program
    tensors = read_header(tmp_path / "new" / "folder" / "experts-00001.safetensors")
    np.testing.assert_array_equal(read(tensors["b_up"]), np.asarray(experts.b_up[1]))


def test_read_ahead_covers_the_rows(experts, tmp_path, monkeypatch):
    """No piece of advice is longer than what the operating system follows, and none waits."""
    wide = jax.tree.map(lambda leaf: jnp.tile(leaf, (1,) * (leaf.ndim - 1) + (700,)), experts)
    opened = on_disk(tmp_path, wide)
    advised = []

    def advise(file, start, length, advice):
        assert file == opened.files[1].file.fileno() and advice == os.POSIX_FADV_WILLNEED
        assert 0 < length <= 128 * 2**10
        advised.append((start, start + length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    named = jnp.array([-1, E + 2, -1], jnp.int32)
    np.testing.assert_array_equal(opened.will_need(named), named)
    opened.reader.shutdown()  # waits for it
    assert len(advised) > len(jax.tree.leaves(wide))
    stored = read_header(tmp_path / "experts-00001.safetensors").values()
    sizes = [one.nbytes // E for one in stored]
    assert sum(end - start for start, end in advised) == sum(sizes)
    for one, size in zip(stored, sizes, strict=True):
        first = one.offset + 2 * size
        assert min(s for s, _ in advised if s >= first) == first
        assert max(e for _, e in advised if e <= first + size) == first + size


def test_a_system_that_takes_no_advice_is_named_first(experts, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    with pytest.raises(InputError, match="want an operating system with posix_fadvise"):
        missing_layers(tmp_path, shapes_like(experts), MODEL)


def test_a_stopped_run_goes_on(experts, tmp_path):
    shapes = shapes_like(experts)
    assert missing_layers(tmp_path / "none", shapes, MODEL) == [0, 1]
    write(tmp_path, experts, layers=[1])
    (tmp_path / ".experts-00000.safetensors.tmp").write_bytes(b"half")
    assert missing_layers(tmp_path, shapes, MODEL) == [0]
    with pytest.raises(InputError, match="lacks 1 of 2 layers of experts, .* experts-00000.safe"):
        open_experts(tmp_path, shapes, MODEL)
    write(tmp_path, experts, layers=[0])
    assert open_experts(tmp_path, shapes, MODEL).folder == tmp_path


def truncated(folder, shapes):
    path = folder / "experts-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return shapes, MODEL, "experts-00001.safetensors is truncated: b_down ends at byte"


def empty_file(folder, shapes):
    (folder / "experts-00000.safetensors").write_bytes(b"")
    return shapes, MODEL, "is not a safetensors file or is truncated"


def other_model(folder, shapes):
    return shapes, "feedfacefeedface", f"was made for model {MODEL}, not feedfacefeedface"


def no_fingerprint(folder, shapes):
    path = folder / "experts-00000.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"model"', b'"mold0"'))
    return shapes, MODEL, "was made for model None"


def other_dtype(folder, shapes):
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)
    return half, MODEL, r"w_gate is float32\[4, 8, 24\], want bfloat16\[4, 8, 24\]; choose another"


def other_width(folder, shapes):
    sizes = {name: (L, E, 8, 16) for name in ("w_gate", "w_up")} | {"w_down": (L, E, 16, 8)}
    wide = {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}
    return (
        dataclasses.replace(shapes, **wide),
        MODEL,
        r"w_gate is float32\[4, 8, 24\], want float32\[4, 8, 16\]",
    )


def other_things(folder, shapes):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return shapes, MODEL, "holds no experts but 'config.json'; give them a folder of their own"


def a_file(folder, shapes):
    shutil.rmtree(folder)
    folder.write_text("")
    return shapes, MODEL, "is not a folder"


@pytest.mark.parametrize(
    "spoil",
    [truncated, empty_file, other_model, no_fingerprint, other_dtype, other_width, other_things,
     a_file],
    ids=lambda spoil: spoil.__name__,
)  # fmt: skip
def test_wrong_folders_are_refused(experts, tmp_path, spoil):
    folder = tmp_path / "folder"
    write(folder, experts)
    shapes, model, message = spoil(folder, shapes_like(experts))
    with pytest.raises(InputError, match=message) as caught:
        open_experts(folder, shapes, model)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made(experts, tmp_path, monkeypatch):
    shapes = shapes_like(experts)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write experts in .*: Not a directory"):
        make_folder(tmp_path / "file" / "folder", shapes, L)
    free = shutil._ntuple_diskusage(0, 0, 2**10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match="no free disk: experts in .* want 0 MiB, found 0 MiB"):
        make_folder(tmp_path / "folder", shapes, L)
    assert not (tmp_path / "folder").exists()
    make_folder(tmp_path, shapes, 0)
