"""Files against the `safetensors` package: written in turn, or row by row in any order."""

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from moejax.core.safetensors import Writer, read, read_header, read_metadata, write_rows

RNG = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RNG.normal(size=(3, 4, 2)).astype(np.float32),
    "b": RNG.normal(size=(5,)).astype(ml_dtypes.bfloat16),
    "c": RNG.integers(0, 255, (2, 3)).astype(np.uint8),
    "empty": np.zeros((0, 3), np.float32),
}


def assert_holds_arrays(path):
    with safe_open(path, "np") as file:
        assert set(file.keys()) == ARRAYS.keys()
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)
    stored = read_header(path)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read(stored[name]), array)


def test_safetensors_reads_what_is_written(tmp_path):
    path = tmp_path / "file"
    writer = Writer(path, list(ARRAYS))
    for name, array in ARRAYS.items():
        assert not path.exists()
        writer.add(name, array)
    writer.close()
    assert_holds_arrays(path)
    fp8 = ARRAYS["a.weight"].astype(ml_dtypes.float8_e4m3fn)
    writer = Writer(path, ["fp8"])
    writer.add("fp8", fp8)
    writer.close()
    np.testing.assert_array_equal(read(read_header(path)["fp8"]), fp8)


def test_rows_in_any_order_make_the_same_file(tmp_path):
    path = tmp_path / "file"
    rows = [(name, row) for name, array in ARRAYS.items() for row in range(len(array))]
    with write_rows(path, ARRAYS, {"model": "mine"}) as put:
        for i in RNG.permutation(len(rows)):
            name, row = rows[i]
            put(name, row, ARRAYS[name][row])
        assert not path.exists()
    assert_holds_arrays(path)
    assert read_metadata(path) == {"format": "pt", "model": "mine"}
    assert read_header(path)["a.weight"].offset % 4096 == 0


def test_what_was_not_finished_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(AssertionError, match="4 rows were not put"):
        with write_rows(path, {"b": ARRAYS["b"]}, {}) as put:
            put("b", 1, ARRAYS["b"][1])
    with pytest.raises(AssertionError, match="b: float32"):
        with write_rows(path, {"b": ARRAYS["b"]}, {}) as put:
            put("b", 1, np.ones((), np.float32))
    with pytest.raises(KeyboardInterrupt):
        with write_rows(path, {"b": ARRAYS["b"]}, {}):
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
