"""Saving and restoring fitted predictors: orbax arrays beside a JSON that says what they are.

The JSON is written last and removed first, so a folder with one holds a complete predictor.
"""

import json
import os
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moejax.core.disk import writing
from moejax.core.errors import InputError, check
from moejax.predictors.kinds import KINDS, Predictor

FORMAT, VERSION = "moejax.predictor", 1


def save_predictor(folder: str | os.PathLike, params: Predictor) -> None:
    """Writes `params` to `folder`, replacing a predictor; `InputError` when the disk is full."""
    folder = pathlib.Path(folder).absolute()
    kind, config = describe(params)
    header = {"format": FORMAT, "version": VERSION, "kind": kind, "config": config}
    with writing("a predictor", folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "predictor.json").unlink(missing_ok=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "params", params, force=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".predictor.")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(header, file, indent=1)
            os.replace(temporary, folder / "predictor.json")
        except BaseException:
            os.unlink(temporary)
            raise


def restore_predictor(folder: str | os.PathLike) -> Predictor:
    """Reads what `save_predictor` wrote; `InputError` says why anything else is refused.

    The arrays are committed to no device, so that they join a program over any mesh.
    """
    folder = pathlib.Path(folder).absolute()
    kind, config = _read_header(folder / "predictor.json")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(lambda: KINDS[kind].init(jax.random.key(0), **config)),
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(folder / "params", abstract)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: cannot restore this {kind} predictor: {reason}") from error
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)


def describe(params: Predictor) -> tuple[str, dict[str, int]]:
    """The kind of a predictor and the sizes that determine its shapes."""
    for name, kind in KINDS.items():
        if isinstance(params, kind.params):
            return name, kind.sizes(params)
    raise InputError(f"{type(params).__name__} is no predictor of {sorted(KINDS)}")


def _read_header(path: pathlib.Path) -> tuple[str, dict[str, int]]:
    try:
        header: Any = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; is this a saved predictor?") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    ours = isinstance(header, dict) and header.get("format") == FORMAT
    check(ours, f"{path}: not a {FORMAT} file")
    version, kind, config = header.get("version"), header.get("kind"), header.get("config")
    check(version == VERSION, f"{path}: version {version!r}, this program reads {VERSION}")
    check(kind in KINDS, f"{path}: kind {kind!r}, expected one of {sorted(KINDS)}")
    wanted = KINDS[kind].names
    good = isinstance(config, dict) and set(config) == wanted
    good = good and all(type(size) is int and size > 0 for size in config.values())
    check(good, f"{path}: config {config!r}, expected positive sizes {sorted(wanted)}")
    return kind, config
