"""Writes an imported model as a checkpoint of moejax that remembers where it came from."""

import json
import pathlib

import jax
import numpy as np

from moejax.checkpoint import manager as checkpoints
from moejax.checkpoint.config_json import to_json
from moejax.core.errors import check
from moejax.interop.hf.export import save_folder
from moejax.interop.hf.load import Imported
from moejax.interop.load import HF
from moejax.kernels.quantized import is_quantized
from moejax.models.experts import join_experts


def write_checkpoint(model: Imported, path: str | pathlib.Path) -> int:
    """Step 0 in folder `path`, unless it is there already; returns the number of its arrays.

    Experts are in logical order, so that any mesh restores them (`interop.load`,
    `models.restore`). A process that is stopped leaves no checkpoint that counts. Raises
    `InputError` for quantised experts, and for a folder that holds another model.
    """
    _check_whole(model, path)
    check(
        not (pathlib.Path(path) / "config.json").exists(),
        f"cannot write {path}: it holds a config.json, which would hide the checkpoint",
    )
    # Views of the host arrays, of as many groups as there are: nothing goes to a device.
    experts = jax.tree.map(np.asarray, model.experts)
    params = join_experts(model.params, experts, model.cfg)
    kept = {
        "config": model.hf_config,
        "stored_dtypes": model.stored_dtypes,
        "context": model.context,
    }
    extra = {"model": to_json(model.cfg), HF: kept}
    with checkpoints.open_manager(path) as manager:
        if (step := manager.latest_step()) is None:
            checkpoints.save(manager, 0, params=params, extra=extra)
            checkpoints.finish(manager)
        else:
            same = checkpoints.read_extra(manager, step) == json.loads(json.dumps(extra))
            check(same, f"cannot write {path}: it holds a checkpoint of another model")
    return len(jax.tree.leaves(params))


def write_folder(model: Imported, path: str | pathlib.Path) -> int:
    """A folder that `transformers` loads; the number of its tensors.

    Raises `InputError` for a model that was never a Hugging Face one, and for quantised experts.
    """
    _check_whole(model, path)
    check(
        bool(model.hf_config),
        f"cannot write {path}: the model was not imported and has no config.json",
    )
    return len(save_folder(model, path))


def _check_whole(model: Imported, path: str | pathlib.Path) -> None:
    check(
        not is_quantized(model.experts),
        f"cannot write {path}: the experts were quantised when they were read",
    )
