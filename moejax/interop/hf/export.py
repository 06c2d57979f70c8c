"""Writes a model as a checkpoint folder that Hugging Face libraries load."""

import json
import os
import pathlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from moejax.core.disk import writing
from moejax.core.errors import check
from moejax.core.safetensors import DTYPES, Writer, read_header
from moejax.interop.hf.buffers import read_index
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.load import Imported, stored_dtype
from moejax.interop.hf.plan import Piece, leaves_of, make_plan
from moejax.interop.hf.registry import find_architecture
from moejax.interop.hf.rules import Shape
from moejax.interop.hf.tensors import INDEX, SINGLE

MAX_SHARD_BYTES = 5 * 10**9


def save_folder(
    model: Imported, path: str | pathlib.Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Writes config.json and safetensors files of at most `max_shard_bytes` (or one tensor).

    Tensors have the dtypes that they were read in, packed ones that of config.json. Returns the
    names of the tensors. A run that was stopped goes on behind its last complete file. Raises
    `InputError` when the folder holds a checkpoint or the disk is full. Cost: one tensor of memory
    beside the model.
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
        tensors = partial(_tensors, model, plan, leaves, empty)
        _write_shards(folder, names, tensors, max_shard_bytes)
        text = json.dumps(model.hf_config, indent=2) + "\n"
        (folder / "config.json").write_text(text)
    return names


def _tensors(
    model: Imported, plan: list[Piece], leaves: dict, empty: dict[str, Shape], skip: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors in turn but the first `skip`; rows of one tensor are neighbours in `plan`."""
    names = list(dict.fromkeys(piece.name for piece in plan))
    done = set(names[:skip])
    plan = [piece for piece in plan if piece.name not in done]
    main = stored_dtype(Fields(model.hf_config))
    known = {str(dtype): dtype for dtype in DTYPES.values()}
    rows: list[np.ndarray] = []
    for piece, after in zip(plan, (*plan[1:], None), strict=True):
        arrays = [read_index(leaves[to.leaf], to.index) for to in piece.targets]
        dtype = known[model.stored_dtypes.get(piece.name, main)]
        array = piece.how.save(arrays).astype(dtype)
        if piece.row is None:
            yield piece.name, array
            continue
        rows.append(array)
        if after is None or after.name != piece.name:
            yield piece.name, np.stack(rows)
            rows = []
    for name, shape in list(empty.items())[max(skip - len(names), 0) :]:
        yield name, np.zeros(shape, known[main])


def _write_shards(
    folder: pathlib.Path,
    names: list[str],
    tensors: Callable[[int], Iterator[tuple[str, np.ndarray]]],
    max_shard_bytes: int,
) -> None:
    """Files model-00001-of-00003.safetensors and their index, or one file.

    A part has its name only when it is complete; parts of a run that was stopped are kept.
    """
    files = _complete_parts(folder, names)
    writer = None
    for name, array in tensors(sum(len(file) for file in files)):
        full = writer is not None and writer.nbytes + array.nbytes > max_shard_bytes
        if writer is not None and full:
            writer.close()
        if writer is None or full:
            files.append([])
            writer = Writer(_part(folder, len(files)), names)
        writer.add(name, array)
        files[-1].append(name)
    if writer is not None:
        writer.close()
    _name_shards(folder, files)


def _part(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"shard-{number:05d}.part"


def _complete_parts(folder: pathlib.Path, names: list[str]) -> list[list[str]]:
    """The tensors of each part that is there already."""
    files: list[list[str]] = []
    while _part(folder, len(files) + 1).exists():
        files.append(list(read_header(_part(folder, len(files) + 1))))
    done = [name for file in files for name in file]
    check(done == names[: len(done)], f"{folder} holds parts of another checkpoint")
    return files


def _name_shards(folder: pathlib.Path, files: list[list[str]]) -> None:
    """Gives the parts the names that say how many there are, and writes the index."""
    parts = [_part(folder, i + 1) for i in range(len(files))]
    if len(parts) == 1:
        os.replace(parts[0], folder / SINGLE)
        return
    total = sum(stored.nbytes for part in parts for stored in read_header(part).values())
    weight_map: dict[str, str] = {}
    for i, (part, names) in enumerate(zip(parts, files, strict=True)):
        final = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        os.replace(part, folder / final)
        weight_map |= dict.fromkeys(names, final)
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
