"""Writes a model as a checkpoint folder that Hugging Face libraries load."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from moejax.core.disk import writing
from moejax.core.errors import check
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.load import Imported, stored_dtype
from moejax.interop.hf.plan import Piece, leaves_of, make_plan
from moejax.interop.hf.registry import find_architecture
from moejax.interop.hf.rules import Shape
from moejax.interop.hf.tensors import DTYPES, INDEX, SINGLE, Writer

MAX_SHARD_BYTES = 5 * 10**9


def save_folder(
    model: Imported, path: str | pathlib.Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Writes config.json and safetensors files of at most `max_shard_bytes` (or one tensor).

    Tensors have the dtypes that they were read in, packed ones that of config.json. Returns the
    names of the tensors. Raises `InputError` when the folder holds a checkpoint or the disk is
    full. Cost: one tensor of memory beside the model.
    """
    folder = pathlib.Path(path)
    check(
        not (folder / "config.json").exists(), f"{folder} holds a checkpoint; choose another folder"
    )
    leaves = leaves_of((model.params, model.experts))
    architecture = find_architecture(model.hf_config, folder)
    plan = make_plan(architecture.rules(model.cfg), model.cfg, leaves)
    empty = architecture.placeholders(model.cfg)
    names = [*dict.fromkeys(piece.name for piece in plan), *empty]
    with writing("checkpoint", folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_shards(folder, names, _tensors(model, plan, leaves, empty), max_shard_bytes)
        text = json.dumps(model.hf_config, indent=2) + "\n"
        (folder / "config.json").write_text(text)
    return names


def _tensors(
    model: Imported, plan: list[Piece], leaves: dict, empty: dict[str, Shape]
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in turn; the rows of one that holds all experts are neighbours in `plan`."""
    main = stored_dtype(Fields(model.hf_config))
    known = {str(dtype): dtype for dtype in DTYPES.values()}
    rows: list[np.ndarray] = []
    for piece, after in zip(plan, (*plan[1:], None), strict=True):
        arrays = [_read(leaves[to.leaf], to.index) for to in piece.targets]
        dtype = known[model.stored_dtypes.get(piece.name, main)]
        array = piece.how.save(arrays).astype(dtype)
        if piece.row is None:
            yield piece.name, array
            continue
        rows.append(array)
        if after is None or after.name != piece.name:
            yield piece.name, np.stack(rows)
            rows = []
    for name, shape in empty.items():
        yield name, np.zeros(shape, known[main])


def _read(leaf: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """`leaf[index]` on the host, from the shard that has it."""
    for shard in leaf.addressable_shards:
        bounds = [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True)]
        leading = list(zip(index, bounds[: len(index)], strict=True))
        if all(start <= i < stop for i, (start, stop) in leading):
            return np.asarray(shard.data)[tuple(i - start for i, (start, _) in leading)]
    raise AssertionError(f"no shard of this process holds {index} of {leaf.shape}")


def _write_shards(folder: pathlib.Path, names: list[str], tensors, max_shard_bytes: int) -> None:
    """Files model-00001-of-00003.safetensors and their index, or one file."""
    files: list[list[str]] = []
    sizes: list[int] = []
    writer = None
    for name, array in tensors:
        if writer is None or (writer.nbytes and writer.nbytes + array.nbytes > max_shard_bytes):
            if writer is not None:
                writer.close()
                sizes.append(writer.nbytes)
            files.append([])
            writer = Writer(folder / f"shard-{len(files):05d}.part", names)
        writer.add(name, array)
        files[-1].append(name)
    assert writer is not None, "a model has tensors"
    writer.close()
    sizes.append(writer.nbytes)
    _name_shards(folder, files, sum(sizes))


def _name_shards(folder: pathlib.Path, files: list[list[str]], total: int) -> None:
    """Gives the parts the names that say how many there are, and writes the index."""
    parts = [folder / f"shard-{i + 1:05d}.part" for i in range(len(files))]
    if len(parts) == 1:
        os.replace(parts[0], folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, (part, names) in enumerate(zip(parts, files, strict=True)):
        final = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        os.replace(part, folder / final)
        weight_map |= dict.fromkeys(names, final)
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
