"""A folder of checkpoints: `<step>/{params,optimizer,extra}`, written by orbax.

A checkpoint is written under a temporary name and renamed when it is complete, so a process that is
killed at any moment leaves the latest complete one in place. Parameters are an item of their own,
so that a server restores them without reading the optimizer; `extra` is JSON.
"""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore

from moejax.core.disk import check_free, writing
from moejax.core.errors import InputError, check
from moejax.core.memory import nbytes

PyTree = Any
TREES = ("params", "optimizer")
EXTRA = "extra"


def open_manager(
    path: str | pathlib.Path, *, keep: int = 2, read_only: bool = False
) -> ocp.CheckpointManager:
    """The checkpoints in folder `path`, which is made unless `read_only`. A context manager.

    Saves are asynchronous: arrays are copied before `save` returns, files are written behind.
    Leftovers of a killed process are removed.
    """
    path = pathlib.Path(path).absolute()
    check(not path.exists() or path.is_dir(), f"checkpoint path {path} is not a folder")
    check(path.exists() or not read_only, f"checkpoint path {path} does not exist")
    handlers = {name: ocp.StandardCheckpointHandler() for name in TREES}
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep,
        cleanup_tmp_directories=not read_only,
        create=not read_only,
    )
    with writing("checkpoints", path):
        return ocp.CheckpointManager(
            path, item_handlers={**handlers, EXTRA: ocp.JsonCheckpointHandler()}, options=options
        )


def save(
    manager: ocp.CheckpointManager,
    step: int,
    *,
    params: PyTree,
    optimizer: PyTree = None,
    extra: dict[str, Any],
) -> None:
    """Starts writing checkpoint `step`; waits for the one before. The trees may be donated after.

    Without an `optimizer` only the weights are kept. Raises `InputError` when the disk is full.
    """
    with writing("checkpoints", manager.directory):
        items: dict[str, Any] = {"params": ocp.args.StandardSave(params)}
        if optimizer is not None:
            items["optimizer"] = ocp.args.StandardSave(optimizer)
        items[EXTRA] = ocp.args.JsonSave(extra)
        manager.save(step, args=ocp.args.Composite(**items), force=True)


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until the last save is complete; raises `InputError` when the disk is full."""
    with writing("checkpoints", manager.directory):
        manager.wait_until_finished()


def check_free_disk(path: str | pathlib.Path, trees: PyTree, *, copies: int = 3) -> None:
    """Raises `InputError` now rather than at the first save: two kept and one being written."""
    check_free(f"{copies} checkpoints", path, copies * nbytes(trees))


def latest_step(manager: ocp.CheckpointManager) -> int:
    """The newest complete checkpoint; raises `InputError` when there is none."""
    step = manager.latest_step()
    if step is None:
        raise InputError(f"{manager.directory} holds no complete checkpoint")
    return step


def read_extra(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The JSON part of checkpoint `step`."""
    _check_item(manager, step, EXTRA)
    with _unreadable(manager, step, EXTRA):
        return manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))[EXTRA]


def restore(manager: ocp.CheckpointManager, step: int, abstract: dict[str, PyTree]) -> dict:
    """Restores the items named in `abstract`, each leaf straight to where its struct says.

    Args:
        abstract: item name to a tree of `ShapeDtypeStruct`s with explicit shardings; the memory
            kind of a sharding decides whether a leaf lands on the device or in host memory.

    Raises `InputError` when an item or leaf is missing, unknown, of another shape or dtype, or
    cannot be read. Cost: one read of the item's files; no array is staged on another memory.
    """
    restored = {}
    for name, tree in abstract.items():
        _check_item(manager, step, name)
        with _unreadable(manager, step, name):
            folder = manager.directory / str(step) / name
            _check_whole(str(folder))
            stored = ocp.StandardCheckpointHandler().metadata(folder).tree
        _check_leaves(f"checkpoint {manager.directory / str(step)}, {name}", stored, tree)
        with _unreadable(manager, step, name):
            args = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree)})
            restored[name] = manager.restore(step, args=args)[name]
    return restored


def _check_item(manager: ocp.CheckpointManager, step: int, name: str) -> None:
    folder = manager.directory / str(step)
    check((folder / name).is_dir(), f"{folder} is not a checkpoint of moejax: it has no {name!r}")


def _check_whole(folder: str) -> None:
    """Reads the last byte of every stored value, so that orbax meets no truncated file.

    Orbax leaves its event loop at the first failed read, and every read that fails after that
    prints a traceback of its own.
    """
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    last = slice(-1, None)
    for read in [store.read(key, byte_range=last) for key in store.list().result()]:
        read.result()


def _check_leaves(where: str, stored: PyTree, wanted: PyTree) -> None:
    have, want = _leaves_by_name(stored), _leaves_by_name(wanted)
    for name in want.keys() - have.keys():
        raise InputError(f"{where}: no leaf {name}, {len(have)} others")
    for name in have.keys() - want.keys():
        raise InputError(f"{where}: leaf {name} is not part of this model")
    for name, leaf in want.items():
        stored_leaf = have[name]
        got = (tuple(stored_leaf.shape), str(stored_leaf.dtype))
        expected = (tuple(leaf.shape), str(leaf.dtype))
        check(got == expected, f"{where}: leaf {name} is {_spell(got)}, want {_spell(expected)}")


def _leaves_by_name(tree: PyTree) -> dict[str, Any]:
    # Orbax stores structs as dicts and tuples as lists: only the names on the way are comparable.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _spell(shape_and_dtype: tuple[tuple[int, ...], str]) -> str:
    shape, dtype = shape_and_dtype
    return f"{dtype}{list(shape)}"


@contextlib.contextmanager
def _unreadable(manager: ocp.CheckpointManager, step: int, name: str) -> Iterator[None]:
    # Existence, shapes and dtypes are checked apart, so what still fails is in the files; they can
    # fail in any way that orbax, tensorstore and JSON can.
    try:
        yield
    except Exception as error:
        raise InputError(
            f"checkpoint {manager.directory / str(step)}: {name!r} is truncated or damaged "
            f"({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
