"""Models whose experts stay on disk: into a folder once, row by row, and opened from then on.

The folder knows which model it was made of by a fingerprint: names and shapes of all tensors, and
the first bytes of some. Writing goes layer by layer, so that a run that was stopped goes on.

Axis letters:
    L  MoE layers    E  experts
"""

import dataclasses
import hashlib
import pathlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.core.disk import writing
from moejax.core.memory import nbytes
from moejax.core.safetensors import PutRow, Stored
from moejax.experts.quantize import quantize_matrix
from moejax.interop.hf.buffers import read_index
from moejax.interop.hf.load import (
    Imported,
    OpenModel,
    Progress,
    abstract_model,
    counter,
    fill,
    plan_reading,
    put_pieces,
)
from moejax.interop.hf.plan import Piece, leaves_of
from moejax.kernels.quantized import Format, Quantized
from moejax.models.params import DecoderParams
from moejax.offload.disk import (
    DiskExperts,
    layer_bytes,
    layer_tensors,
    make_folder,
    missing_layers,
    open_experts,
    write_layer,
)

_SAMPLES, _SAMPLE_BYTES = 256, 4096


def load_on_disk(
    opened: OpenModel,
    folder: pathlib.Path,
    *,
    mesh: Mesh,
    experts_dtype: Format | None = None,
    progress: Progress | None = None,
) -> tuple[DecoderParams, DiskExperts]:
    """The weights of a Hugging Face folder without experts, and its experts in `folder`.

    Writes the layers that `folder` does not have yet; arguments and errors as in `load_folder`, and
    `InputError` for a folder of another model, a damaged one, and a disk without room. Cost: host
    memory of the weights that are no experts and of two tensors, three where one is quantised.
    """
    target = abstract_model(
        opened.cfg, mesh=mesh, expert_memory="pinned_host", experts_dtype=experts_dtype
    )
    dense, shapes = target
    reading = plan_reading(opened, target)
    model, where = _fingerprint_of_files(opened.stored), pathlib.Path(folder)
    missing = missing_layers(where, shapes, model)
    make_folder(where, shapes, len(missing))
    count = counter(progress, nbytes(dense) + len(missing) * layer_bytes(shapes))
    pieces = defaultdict(list)
    for piece in reading.plan:
        pieces[_layer_of(piece)].append(piece)
    for layer in missing:
        with writing("experts", where), write_layer(where, layer, shapes, model) as put:
            sinks = {
                name: _Rows(name.removeprefix("experts."), leaf, put)
                for name, leaf in leaves_of((None, shapes)).items()
            }
            put_pieces(dataclasses.replace(reading, plan=pieces[layer]), sinks, count)
    params, _ = fill((dense, None), dataclasses.replace(reading, plan=pieces[None]), count)
    return params, open_experts(where, shapes, model)


def keep_on_disk(model: Imported, folder: pathlib.Path) -> DiskExperts:
    """The experts of a model in memory, in `folder`; errors as in `load_on_disk`."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.experts)
    leaves, num_experts = jax.tree.leaves(model.experts), shapes.w_gate.shape[1]
    name, folder = _fingerprint_of_arrays(model), pathlib.Path(folder)
    missing = missing_layers(folder, shapes, name)
    make_folder(folder, shapes, len(missing))
    for layer in missing:
        with writing("experts", folder), write_layer(folder, layer, shapes, name) as put:
            for tensor, leaf in zip(layer_tensors(shapes), leaves, strict=True):
                for expert in range(num_experts):
                    put(tensor, expert, read_index(leaf, (layer, expert)))
    return open_experts(folder, shapes, name)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """One parameter of the layer that is being written; of index (layer, expert)."""

    name: str
    leaf: Any  # abstract, or `Quantized` of abstract leaves
    put_row: PutRow

    def put(self, index: tuple[int, ...], value: np.ndarray) -> int:
        """Casts, or quantises, and writes one row; returns its bytes."""
        if isinstance(self.leaf, Quantized):
            format: Any = self.leaf.format
            both = quantize_matrix(value, format, f"experts.{self.name}{list(index)}")
            rows = dict(zip((f"{self.name}.q", f"{self.name}.scale"), both, strict=True))
        else:
            rows = {self.name: value.astype(self.leaf.dtype, copy=False)}
        for name, row in rows.items():
            self.put_row(name, index[1], row)
        return sum(row.nbytes for row in rows.values())


def _layer_of(piece: Piece) -> int | None:
    """The MoE layer whose experts `piece` belongs to, None where to none."""
    target = piece.targets[0]
    return target.index[0] if target.leaf.startswith("experts.") else None


def _fingerprint_of_files(stored: dict[str, Stored]) -> str:
    """Cost: 1 MiB read at most, from as many places as there are samples."""
    names = sorted(stored)
    every = -(-len(names) // _SAMPLES)
    samples = (
        np.fromfile(
            stored[name].file,
            np.uint8,
            min(stored[name].nbytes, _SAMPLE_BYTES),
            offset=stored[name].offset,
        )
        for name in names[::every]
    )
    return _digest((f"{name} {stored[name].dtype}{stored[name].shape}" for name in names), samples)


def _fingerprint_of_arrays(model: Imported) -> str:
    dense = jax.tree_util.tree_leaves_with_path(model.params)
    experts = jax.tree_util.tree_leaves_with_path(model.experts)
    samples = [read_index(leaf, ()) for _, leaf in dense]
    samples += [read_index(leaf, (0, 0)) for _, leaf in experts]
    names = (f"{path} {leaf.dtype}{leaf.shape}" for path, leaf in (*dense, *experts))
    return _digest(names, (sample.reshape(-1).view(np.uint8) for sample in samples))


def _digest(names: Iterable[str], samples: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256("\n".join(names).encode())
    for sample in samples:
        digest.update(sample[:_SAMPLE_BYTES].tobytes())
    return digest.hexdigest()[:16]
