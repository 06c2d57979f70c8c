"""The tensors of a checkpoint folder: one safetensors file, or several and their index."""

import json
import pathlib
from typing import Any

from moejax.core.errors import InputError, check
from moejax.core.safetensors import Stored, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
