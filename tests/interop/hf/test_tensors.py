"""Folders that the `safetensors` package wrote, and folders that are not in order."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moejax.core.errors import InputError
from moejax.core.safetensors import read
from moejax.interop.hf.tensors import INDEX, SINGLE, open_folder

RNG = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RNG.normal(size=(3, 4, 2)).astype(np.float32),
    "b": RNG.normal(size=(5,)).astype(ml_dtypes.bfloat16),
    "c": RNG.integers(0, 255, (2, 3)).astype(np.uint8),
    "d": RNG.normal(size=(2, 2)).astype(np.float16),
    "empty": np.zeros((0, 3), np.float32),
}


def test_reads_what_safetensors_wrote(tmp_path):
    save_file(ARRAYS, tmp_path / SINGLE)
    stored = open_folder(tmp_path)
    assert stored.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert stored[name].shape == array.shape and stored[name].dtype == array.dtype
        np.testing.assert_array_equal(read(stored[name]), array)
    np.testing.assert_array_equal(read(stored["a.weight"], 2), ARRAYS["a.weight"][2])


def shards(folder):
    """Two files and their index."""
    save_file({"a": ARRAYS["d"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": ARRAYS["d"]}, folder / "model-00002-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return names


def test_shards_by_index(tmp_path):
    shards(tmp_path)
    assert sorted(open_folder(tmp_path)) == ["a", "b"]


def no_weight_map(folder):
    (folder / INDEX).write_text("{}")
    return "has no weight_map"


def missing_shard(folder):
    shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return "lacks 1 of the 2 files that its index names: model-00002-of-00002"


def absent_tensor(folder):
    names = shards(folder)
    names["c"] = names["a"]
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return "lacks 1 tensors that its index names: c"


def file_elsewhere(folder):
    names = shards(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "x.safetensors").write_bytes(b"")
    (folder / INDEX).write_text(json.dumps({"weight_map": names | {"a": "sub/x.safetensors"}}))
    return "names a file elsewhere: sub/x.safetensors"


def truncated(folder):
    save_file(ARRAYS, folder / SINGLE)
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-10])
    return "is truncated: .* ends at byte"


def truncated_header(folder):
    (folder / SINGLE).write_bytes((1000).to_bytes(8, "little") + b"{}")
    return "is truncated: a header of 1000 bytes in a file of 10"


def not_json(folder):
    (folder / SINGLE).write_bytes((4).to_bytes(8, "little") + b"abcd")
    return "has a damaged header"


def entry(folder, **fields):
    whole = dict(dtype="F32", shape=[2], data_offsets=[0, 8]) | fields
    text = json.dumps({"w": whole}).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


def unknown_dtype(folder):
    entry(folder, dtype="F4")
    return "w has dtype F4, known are F64"


def wrong_length(folder):
    entry(folder, shape=[3])
    return r"w is F32\[3\], which is 12 bytes and not 8"


def damaged_entry(folder):
    entry(folder, data_offsets=[0])
    return "w has a damaged header entry"


def negative_shape(folder):
    entry(folder, shape=[-1, -2])
    return "w has a damaged header entry"


def dtype_of_another_type(folder):
    entry(folder, dtype=["F32"])
    return "w has a damaged header entry"


def offsets_of_another_type(folder):
    entry(folder, data_offsets=["0", 8])
    return "w has a damaged header entry"


def header_of_another_type(folder):
    (folder / SINGLE).write_bytes((2).to_bytes(8, "little") + b"[]")
    return "damaged header: it is not a JSON object"


def index_of_another_type(folder):
    (folder / INDEX).write_text('{"weight_map": {"a": 5}}')
    return "index.json names 5, which is no file"


def pickle(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")
    return "pytorch_model.bin is a pickle, which is never loaded"


def nothing(folder):
    return "has neither model.safetensors.index.json nor model.safetensors"


@pytest.mark.parametrize(
    "spoil",
    [
        no_weight_map,
        missing_shard,
        absent_tensor,
        file_elsewhere,
        truncated,
        truncated_header,
        not_json,
        unknown_dtype,
        wrong_length,
        damaged_entry,
        negative_shape,
        dtype_of_another_type,
        offsets_of_another_type,
        header_of_another_type,
        index_of_another_type,
        pickle,
        nothing,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_wrong_files_are_refused(tmp_path, spoil):
    message = spoil(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_folder(tmp_path / "model")
