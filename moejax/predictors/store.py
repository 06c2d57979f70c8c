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
from moejax.predictors.history import HistoryParams, init_history
from moejax.predictors.residual import ResidualParams, init_residual

FORMAT, VERSION = "moejax.predictor", 1
Predictor = ResidualParams | HistoryParams


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
        jax.eval_shape(lambda: _initial(kind, config)),
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
    if isinstance(params, ResidualParams):
        targets, d_model, hidden = params.net.w_in.shape
        sizes = {"num_layers": targets + 1, "d_model": d_model, "hidden": hidden}
        return "residual", sizes | {"num_experts": params.net.w_out.shape[-1]}
    num_layers, num_experts = params.popularity.shape
    vocab_size, embedding = params.net.embedding.shape
    return "history", {
        "num_layers": num_layers,
        "num_experts": num_experts,
        "vocab_size": vocab_size,
        "embedding": embedding,
        "hidden": params.net.reader.w_in.shape[-1],
        "horizons": params.horizons,
    }


SIZES = {
    "residual": {"num_layers", "d_model", "hidden", "num_experts"},
    "history": {"num_layers", "num_experts", "vocab_size", "embedding", "hidden", "horizons"},
}


def _initial(kind: str, config: dict[str, int]) -> Predictor:
    key, config = jax.random.key(0), dict(config)
    if kind == "residual":
        return init_residual(key, **config)
    popularity = jnp.zeros((config.pop("num_layers"), config.pop("num_experts")))
    return init_history(key, popularity, **config)


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
    check(kind in SIZES, f"{path}: kind {kind!r}, expected one of {sorted(SIZES)}")
    good = isinstance(config, dict) and set(config) == SIZES[kind]
    good = good and all(type(size) is int and size > 0 for size in config.values())
    check(good, f"{path}: config {config!r}, expected positive sizes {sorted(SIZES[kind])}")
    return kind, config
