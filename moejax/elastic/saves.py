"""Checkpoints that process 0 writes by itself, waiting for no other.

Orbax lets all processes meet when it saves; with one of them dead the others would wait. In an
elastic run (`elastic.alive`) the state is whole in every process, and a job lives as long as its
process 0: so this one writes. Under a temporary name, renamed when complete: when it dies in a
save, the checkpoint before is still there.

    with open_alone("checkpoints") as saves:
        step, state = latest_state(saves, fresh)
        save_state(saves, step + 10, new)
"""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moejax.checkpoint import manager as checkpoints
from moejax.core.disk import writing
from moejax.core.errors import check


def open_alone(path: str | pathlib.Path, *, keep: int = 2) -> ocp.CheckpointManager:
    """The checkpoints in folder `path`, which is made. A context manager, in process 0 only.

    Leftovers of a killed process are removed. Saves are asynchronous.
    """
    path, here = pathlib.Path(path).absolute(), jax.process_index()
    # Orbax 0.12 leaves host arrays and metadata to process 0, whoever saves.
    check(here == 0, f"process 0 writes the checkpoints of an elastic run, this is process {here}")
    check(not path.exists() or path.is_dir(), f"checkpoint path {path} is not a folder")
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
    )
    handlers: dict[str, Any] = {
        "params": ocp.StandardCheckpointHandler(),
        checkpoints.EXTRA: ocp.JsonCheckpointHandler(),
    }
    with writing("checkpoints", path):
        path.mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(path, item_handlers=handlers, options=options)


def save_state(saves: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Starts writing a tree of host arrays as checkpoint `step`; waits for the one before."""
    checkpoints.save(saves, step, params=state, extra={"step": step})


def latest_state(saves: ocp.CheckpointManager, like: Any) -> tuple[int, Any]:
    """The newest complete checkpoint, as host arrays; (0, `like`) when there is none.

    Raises `InputError` when it is damaged or of another state.
    """
    if saves.latest_step() is None:
        return 0, like
    step = checkpoints.latest_step(saves)
    wanted = jax.tree.map(lambda leaf: np.zeros_like(leaf), like)
    return step, checkpoints.restore(saves, step, {"params": wanted})["params"]
