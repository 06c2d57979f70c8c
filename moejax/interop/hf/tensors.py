"""The tensors of a checkpoint folder: safetensors files, read by name, in whole or row by row.

A safetensors file is eight bytes of header length, a JSON header that gives every tensor's dtype,
shape and byte range, and the bytes. Nothing in it is code. Headers are read when a folder is
opened, a tensor's bytes when it is asked for, into memory of its own: what has been used is freed.
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from moejax.core.errors import InputError, check

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100 * 2**20

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """Where one tensor lies."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def open_folder(path: str | pathlib.Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in folder `path`, by name.

    Reads `model.safetensors.index.json` where there is one, else `model.safetensors`. Raises
    `InputError` for a missing, truncated or damaged file, and where index and files disagree.
    """
    folder = pathlib.Path(path)
    check(folder.is_dir(), f"checkpoint folder {folder} does not exist")
    if (folder / INDEX).exists():
        return _open_indexed(folder)
    single = folder / SINGLE
    if not single.exists():
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is never loaded" if pickles else ""
        raise InputError(f"{folder} has neither {INDEX} nor {SINGLE}{hint}")
    return read_header(single)


def _open_indexed(folder: pathlib.Path) -> dict[str, Stored]:
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict):
        raise InputError(f"{folder / INDEX} has no weight_map")
    wrong = next((file for file in names.values() if not isinstance(file, str)), None)
    check(wrong is None, f"{folder / INDEX} names {wrong!r}, which is no file")
    files = sorted(set(names.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    check(
        not missing,
        f"{folder} lacks {len(missing)} of the {len(files)} files that its index names: "
        f"{', '.join(missing[:3])}",
    )
    tensors: dict[str, Stored] = {}
    for file in files:
        check(
            pathlib.PurePath(file).name == file, f"{folder / INDEX} names a file elsewhere: {file}"
        )
        tensors.update(read_header(folder / file))
    absent = sorted(names.keys() - tensors.keys())
    check(
        not absent,
        f"{folder} lacks {len(absent)} tensors that its index names: {', '.join(absent[:3])}",
    )
    return tensors


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file; `InputError` where there is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    check(isinstance(value, dict), f"{path} is not a JSON object")
    return value


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. Cost: one read of its header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        check(
            2 <= length <= min(_MAX_HEADER_BYTES, size - 8),
            f"{path} is not a safetensors file or is truncated: a header of {length} bytes in a "
            f"file of {size}",
        )
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path} has a damaged header: {error}") from error
    check(isinstance(header, dict), f"{path} has a damaged header: it is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _parse(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _parse(path: pathlib.Path, name: str, entry: Any, start: int, size: int) -> Stored:
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: {name} has a damaged header entry {entry!r}") from error
    sizes = all(type(size) is int and size >= 0 for size in (*shape, begin, end))
    check(sizes and isinstance(kind, str), f"{path}: {name} has a damaged header entry {entry!r}")
    check(kind in DTYPES, f"{path}: {name} has dtype {kind}, known are {', '.join(DTYPES)}")
    stored = Stored(file=path, dtype=DTYPES[kind], shape=shape, offset=start + begin)
    check(
        stored.nbytes == end - begin,
        f"{path}: {name} is {kind}{list(shape)}, which is {stored.nbytes} bytes and not "
        f"{end - begin}",
    )
    check(
        start + end <= size,
        f"{path} is truncated: {name} ends at byte {start + end} of a file of {size}",
    )
    return stored


def read(stored: Stored, row: int | None = None) -> np.ndarray:
    """The tensor, or its `row` along the first axis, in memory of its own."""
    shape, offset = stored.shape, stored.offset
    if row is not None:
        shape = shape[1:]
        offset += row * math.prod(shape) * stored.dtype.itemsize
    array = np.fromfile(stored.file, stored.dtype, math.prod(shape), offset=offset)
    return array.reshape(shape)


class Writer:
    """Writes one safetensors file tensor by tensor; `names` bounds the length of its header.

    The file has its name only once it is complete.
    """

    def __init__(self, path: pathlib.Path, names: list[str]):
        self.path, self.nbytes = path, 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        # A name, its dtype, shape and offsets; spaces behind the header are part of the format.
        self._room = sum(len(json.dumps(name)) + 200 for name in names) + 64
        self._room += -self._room % 8
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file = self._temporary.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, array: np.ndarray) -> None:
        """Appends a tensor."""
        kind = next(kind for kind, dtype in DTYPES.items() if dtype == array.dtype)
        end = self.nbytes + array.nbytes
        entry = {"dtype": kind, "shape": list(array.shape), "data_offsets": [self.nbytes, end]}
        self._header[name], self.nbytes = entry, end
        # Through uint8: the file knows nothing of bfloat16.
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(self._file)

    def close(self) -> None:
        """Writes the header and gives the file its name."""
        text = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._room)
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.close()
        os.replace(self._temporary, self.path)
