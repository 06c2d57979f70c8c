"""Experts on disk: one safetensors file per MoE layer, memory-mapped and read row by row.

For models larger than host memory. A file holds the leaves [E, ...] of a layer's experts as they
are served, so that to fetch an expert is to copy it. What was read stays in the page cache of the
operating system as long as there is room: that cache is the tier between disk and device, and what
`will_need` names is read into it while something else is computed.

Axis letters:
    L  MoE layers    E  experts
"""

import dataclasses
import mmap
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import jax
import numpy as np

from moejax.core.disk import check_free, writing
from moejax.core.errors import check
from moejax.core.safetensors import PutRow, Stored, read_header, read_metadata, write_rows
from moejax.kernels.grouped_ffn import GatedWeights

_MODEL = "model"  # the fingerprint, in a file's metadata
_PATTERN = "experts-{:05d}.safetensors"
# Linux reads no more at a time than the device's read-ahead, by default 128 KiB, and forgets the
# rest of what it was advised of.
_ADVICE = 128 * 2**10


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class DiskExperts:
    """An opened folder, in the place of experts [L, E, ...]: a pytree without arrays.

    Made by `open_experts`. Compiled programs that take it call back to `row` and `will_need`.

    Attributes:
        shapes: what the folder holds, a tree of `ShapeDtypeStruct`s [L, E, ...].
        files: of the layers in turn.
        reader: the thread that asks for what will be needed: to ask may take as long as to read.
    """

    folder: pathlib.Path
    shapes: GatedWeights
    files: tuple["LayerFile", ...] = dataclasses.field(repr=False)
    reader: ThreadPoolExecutor = dataclasses.field(repr=False)

    def row(self, granule: Any) -> GatedWeights:
        """A copy of expert `granule`, `layer * E + expert`, leaves without leading axes.

        Waits for the disk where the page cache does not have it.
        """
        file, expert = self._find(int(granule))
        file.read_ahead(expert)  # in large reads, where page faults make small ones
        # Copied here, where NumPy lets other threads run: the callback copies under Python's lock.
        rows = [leaf.array[expert].copy() for leaf in file.leaves]
        return jax.tree.unflatten(jax.tree.structure(self.shapes), rows)

    def will_need(self, granules: Any) -> np.ndarray:
        """Starts to read experts int32 [n], -1 for none, and does not wait; returns `granules`."""
        granules = np.asarray(granules)
        self.reader.submit(self._read_ahead, granules[granules >= 0])
        return granules

    def _read_ahead(self, granules: np.ndarray) -> None:
        for granule in granules:
            file, expert = self._find(int(granule))
            file.read_ahead(expert)

    def _find(self, granule: int) -> tuple["LayerFile", int]:
        layer, expert = divmod(granule, self.shapes.w_gate.shape[1])
        return self.files[layer], expert


@dataclasses.dataclass(frozen=True)
class _Leaf:
    array: np.ndarray  # [E, ...], a view of the file
    offset: int


@dataclasses.dataclass(frozen=True)
class LayerFile:
    """A file in the address space of this process."""

    file: BinaryIO
    mapped: mmap.mmap
    leaves: tuple[_Leaf, ...]

    def read_ahead(self, expert: int) -> None:
        """Asks the operating system to read the rows of `expert` into its page cache."""
        for leaf in self.leaves:
            size = leaf.array[expert].nbytes
            start = leaf.offset + expert * size
            for begin in range(start, start + size, _ADVICE):
                length = min(_ADVICE, start + size - begin)
                os.posix_fadvise(self.file.fileno(), begin, length, os.POSIX_FADV_WILLNEED)


def open_experts(folder: pathlib.Path, shapes: GatedWeights, fingerprint: str) -> DiskExperts:
    """The experts in `folder`, which must be whole: `shapes` [L, E, ...] of model `fingerprint`.

    Raises `InputError` in one line for files that are missing, damaged or of another model. Cost:
    one header read and one open file per layer; no weights are read.
    """
    missing = missing_layers(folder, shapes, fingerprint)
    num_layers = shapes.w_gate.shape[0]
    check(
        not missing,
        f"{folder} lacks {len(missing)} of {num_layers} layers of experts, the first is "
        f"{missing and _path(folder, missing[0]).name}",
    )
    names = layer_tensors(shapes)
    files = [_map(_path(folder, layer), list(names)) for layer in range(num_layers)]
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="experts")
    return DiskExperts(folder, shapes, tuple(files), reader)


def missing_layers(folder: pathlib.Path, shapes: GatedWeights, fingerprint: str) -> list[int]:
    """The layers that have no file in `folder` yet, which need not exist.

    Raises `InputError` where a file is damaged or of another model, for a folder of other things,
    and on macOS, whose files take no advice.
    """
    check(
        hasattr(os, "posix_fadvise"),
        "experts on disk want an operating system with posix_fadvise, which this one has not",
    )
    if not folder.exists():
        return list(range(shapes.w_gate.shape[0]))
    check(folder.is_dir(), f"experts folder {folder} is not a folder")
    missing = []
    for layer in range(shapes.w_gate.shape[0]):
        path = _path(folder, layer)
        if path.exists():
            _check_file(path, layer_tensors(shapes), fingerprint)
        else:
            missing.append(layer)
    others = [path.name for path in folder.iterdir() if not path.name.startswith(("experts-", "."))]
    check(
        len(missing) < shapes.w_gate.shape[0] or not others,
        f"{folder} holds no experts but {others and others[0]!r}; give them a folder of their own",
    )
    return missing


def make_folder(folder: pathlib.Path, shapes: GatedWeights, layers: int) -> None:
    """Makes `folder` with room for so many layers; `InputError` where that cannot be."""
    check_free("experts", folder, layers * layer_bytes(shapes))
    with writing("experts", folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_layer(
    folder: pathlib.Path, layer: int, shapes: GatedWeights, fingerprint: str
) -> AbstractContextManager[PutRow]:
    """A context in which the rows of one layer are put, by the name of their leaf.

    Names are those of the tree, such as `w_gate` or `w_gate.q`. What is not finished leaves no
    file, so a run that was stopped goes on with this layer. Cost: no memory.
    """
    return write_rows(_path(folder, layer), layer_tensors(shapes), {_MODEL: fingerprint})


def layer_tensors(shapes: GatedWeights) -> dict[str, jax.ShapeDtypeStruct]:
    """What a layer's file holds, [E, ...] by name, in the order of the tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): jax.ShapeDtypeStruct(
            leaf.shape[1:], leaf.dtype
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }


def layer_bytes(shapes: GatedWeights) -> int:
    """Bytes of one layer's experts."""
    leaves = layer_tensors(shapes).values()
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _path(folder: pathlib.Path, layer: int) -> pathlib.Path:
    return folder / _PATTERN.format(layer)


def _check_file(path: pathlib.Path, tensors: dict[str, Any], fingerprint: str) -> None:
    stored = read_header(path)
    for name, want in tensors.items():
        have = stored.get(name)
        spelled = f"{have.dtype}{list(have.shape)}" if have else "not there"
        check(
            have is not None and (have.dtype, have.shape) == (want.dtype, want.shape),
            f"{path} holds other experts: {name} is {spelled}, want {want.dtype}"
            f"{list(want.shape)}; choose another folder",
        )
    made_for = read_metadata(path).get(_MODEL)
    check(
        made_for == fingerprint,
        f"{path} was made for model {made_for}, not {fingerprint}; choose another folder",
    )


def _map(path: pathlib.Path, names: list[str]) -> LayerFile:
    stored = read_header(path)
    file = path.open("rb")
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return LayerFile(file, mapped, tuple(_view(mapped, stored[name]) for name in names))


def _view(mapped: mmap.mmap, stored: Stored) -> _Leaf:
    array = np.ndarray(stored.shape, stored.dtype, buffer=mapped, offset=stored.offset)
    return _Leaf(array, stored.offset)
