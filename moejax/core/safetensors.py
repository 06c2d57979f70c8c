"""Safetensors files: tensors read by name, in whole or row by row, and written.

A file is eight bytes of header length, a JSON header that gives every tensor's dtype, shape and
byte range, and the bytes. Nothing in it is code. The header is read when a file is opened, a
tensor's bytes when it is asked for, into memory of its own: what has been used is freed.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from moejax.core.errors import InputError, check

_MAX_HEADER_BYTES = 100 * 2**20
_METADATA = "__metadata__"
_PAGE = 4096  # bytes

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


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of one file. Cost: one read of its header."""
    header, start, size = _open_header(path)
    header.pop(_METADATA, None)
    return {name: _parse(path, name, entry, start, size) for name, entry in header.items()}


def read_metadata(path: pathlib.Path) -> dict[str, Any]:
    """What the writer of a file says of it, empty where it says nothing."""
    metadata = _open_header(path)[0].get(_METADATA)
    return metadata if isinstance(metadata, dict) else {}


def _open_header(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the bytes behind it start, and the size of the file."""
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
    return header, 8 + length, size


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
        self._header: dict[str, Any] = {_METADATA: {"format": "pt"}}
        # A name, its dtype, shape and offsets; spaces behind the header are part of the format.
        self._room = sum(len(json.dumps(name)) + 200 for name in names) + 64
        self._room += -self._room % 8
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file = self._temporary.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, array: np.ndarray) -> None:
        """Appends a tensor."""
        self._header[name] = _entry(array.dtype, array.shape, self.nbytes)
        self.nbytes += array.nbytes
        self._file.write(_as_bytes(array))

    def close(self) -> None:
        """Writes the header and gives the file its name."""
        text = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._room)
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.close()
        os.replace(self._temporary, self.path)


PutRow = Callable[[str, int, np.ndarray], None]  # (name, row, its values)


@contextlib.contextmanager
def write_rows(
    path: pathlib.Path, leaves: Mapping[str, Any], metadata: dict[str, str]
) -> Iterator[PutRow]:
    """Writes one file of tensors whose shapes are known, row by row and in any order.

    `leaves` are anything with a shape [rows, ...] and a dtype. The file has its name only when the
    block has ended and every row was put; what fails leaves nothing. Tensors start at a multiple of
    a page where rows are whole pages. Cost: no memory.
    """
    header, offsets = _lay_out(leaves, metadata)
    temporary = path.with_name(f".{path.name}.tmp")
    missing = {(name, row) for name, leaf in leaves.items() for row in range(leaf.shape[0])}
    try:
        with temporary.open("wb") as file:
            file.write(header)

            def put(name: str, row: int, array: np.ndarray) -> None:
                wants = leaves[name].shape[1:], leaves[name].dtype
                assert (array.shape, array.dtype) == wants, f"{name}: {array.dtype}{array.shape}"
                file.seek(offsets[name] + row * array.nbytes)
                file.write(_as_bytes(array))
                missing.remove((name, row))

            yield put
        assert not missing, f"{len(missing)} rows were not put"
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _lay_out(leaves: Mapping[str, Any], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """A file up to its first tensor, and where in it each tensor starts."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"} | metadata}
    end = 0
    for name, leaf in leaves.items():
        header[name] = _entry(leaf.dtype, leaf.shape, end)
        end = header[name]["data_offsets"][1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    offsets = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in leaves}
    return len(text).to_bytes(8, "little") + text, offsets


def _entry(dtype: np.dtype, shape: tuple[int, ...], begin: int) -> dict[str, Any]:
    kind = next(kind for kind, known in DTYPES.items() if known == dtype)
    end = begin + math.prod(shape) * dtype.itemsize
    return {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}


def _as_bytes(array: np.ndarray) -> memoryview:
    # A file knows nothing of bfloat16.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
