"""The training loop: data by step, metrics of every step, checkpoints, and resuming.

A run that is killed at any moment and started again continues from its latest complete checkpoint
as if nothing had happened: the batch is a function of (seed, step), and the checkpoint carries the
weights, the optimizer, the seconds spent so far and the metrics of every step.

Several processes run the same loop, each on its own devices of one mesh. They must take the same
decisions at the same steps, so all of them count steps, not seconds.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from moejax.checkpoint import manager as checkpoints
from moejax.core.errors import check
from moejax.data.source import RandomWindows, Source
from moejax.dispatch.overlap import overlap_options
from moejax.models.config import DecoderConfig
from moejax.sync.config import SyncConfig
from moejax.training.config import TrainConfig
from moejax.training.feed import batch_struct, feed
from moejax.training.program import Program, State, make_program
from moejax.training.progress import Update, progress_bar, training_text
from moejax.training.run_log import COLUMNS as COLUMNS
from moejax.training.run_log import RunLog, from_extra, to_extra
from moejax.training.state import StepMetrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run.

    Attributes:
        history: float64 [steps] per column of `COLUMNS`, resumed steps included. `elapsed_secs` is
            when the step's metrics arrived, in seconds of training.
        resumed_step: the step of the checkpoint that this call started from, 0 for none.
    """

    state: State
    history: dict[str, np.ndarray]
    resumed_step: int


def _nothing(*args: Any) -> None:
    del args


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a caller adds to the loop. All processes call all of them, at the same steps.

    Attributes:
        compiled: called with the steps taken so far and the compiled step, before the clock starts.
        dispatched: called with the steps taken and their state, which the next step donates.
        arrived: called with the steps taken so far and the log that ends with their metrics, while
            the next step runs.
    """

    compiled: Callable[[int, jax.stages.Compiled], None] = _nothing
    dispatched: Callable[[int, State], None] = _nothing
    arrived: Callable[[int, RunLog], None] = _nothing


def train(
    data: np.ndarray | Source,
    model: DecoderConfig,
    cfg: TrainConfig,
    *,
    path: str | pathlib.Path,
    mesh: Mesh | None = None,
    sync: SyncConfig = SyncConfig(),  # noqa: B008  (frozen)
    show_progress: bool = False,
    hooks: Hooks = Hooks(),  # noqa: B008  (frozen)
) -> TrainResult:
    """Trains on `data`, or resumes the run whose checkpoints are in folder `path`.

    An array uint8 [N] stands for `RandomWindows` of it. With a mesh, sequences are sharded over
    `data` and `expert`, experts over `expert`; a run may be continued on another mesh and by
    another number of processes. With a method of `sync`, the coordinates of `data` are workers that
    keep weights of their own; their number is part of the run. Returns at once when that run is
    finished. Raises `InputError` when the checkpoints are of another model, run, plan or corpus,
    are damaged, or would not fit on the disk, when the plan does not fit the mesh, and when several
    processes would have to agree on seconds.
    """
    if isinstance(data, np.ndarray):
        shape = dict(batch_size=cfg.batch_size, seq_len=cfg.seq_len)
        data = RandomWindows(data=data, seed=cfg.seed, **shape)
    _check_processes(cfg, mesh)
    program = make_program(model, cfg, mesh, sync)
    checkpoints.check_free_disk(path, program.abstract())
    configs = (model, cfg, sync)
    with checkpoints.open_manager(path) as manager:
        if manager.latest_step() is None:
            state, log = program.init(), RunLog(crc32=data.crc32)
        else:
            state, log = _restore(manager, program, data.crc32, configs)
        first = log.num_steps
        if _progress(cfg, first, log.elapsed_secs) < 1:
            save = partial(_save, manager, program, configs)
            state = _run(program, state, log, data, cfg, mesh, save, show_progress, hooks)
        checkpoints.finish(manager)
    return TrainResult(state=state, history=log.history(), resumed_step=first)


def _check_processes(cfg: TrainConfig, mesh: Mesh | None) -> None:
    count = jax.process_count()
    if count == 1:
        return
    for name in ("horizon_steps", "checkpoint_steps"):
        given = getattr(cfg, name) is not None
        check(given, f"{count} processes have {count} clocks: set {name} instead of seconds")
    devices = [] if mesh is None else mesh.devices.flat
    present = {device.process_index for device in devices}
    absent = sorted(set(range(count)) - present)
    check(not absent, f"the mesh has no device of processes {absent}, out of {count}")


def _progress(cfg: TrainConfig, step: int, elapsed_secs: float) -> float:
    """Share of the run that is done after `step` steps and `elapsed_secs`."""
    if cfg.horizon_steps is not None:
        return step / cfg.horizon_steps
    return elapsed_secs / cfg.horizon_secs


def _run(
    program: Program,
    state: Any,
    log: RunLog,
    source: Source,
    cfg: TrainConfig,
    mesh: Mesh | None,
    save: Callable[[Any, RunLog, float], None],
    show_progress: bool,
    hooks: Hooks,
) -> Any:
    """Steps to the end of the horizon; the last checkpoint is on its way when this returns."""
    step = saved_step = log.num_steps
    struct, done = batch_struct(cfg, mesh), np.float32(0)
    # Compiled before the clock starts: only training counts against the horizon.
    run_step = program.lower(state, struct, done).compile(
        overlap_options(jax.default_backend()) or None
    )
    hooks.compiled(step, run_step)
    clock = _start_clock(log.elapsed_secs)
    saved_secs = clock()
    pending: StepMetrics | None = None
    start = _progress(cfg, step, log.elapsed_secs)
    batches = feed(source, cfg, mesh, step)
    with (
        contextlib.closing(batches),
        progress_bar("training", start=start, show=show_progress) as update,
    ):
        while (done := _progress(cfg, step, clock())) < 1:
            state, metrics = run_step(state, next(batches), np.float32(done))
            step += 1
            # One step late, so that the device never waits for this thread.
            _arrive(pending, log, clock, cfg, hooks, update)
            pending = metrics
            hooks.dispatched(step, state)
            if _due(cfg, step, clock() - saved_secs):
                _arrive(pending, log, clock, cfg, hooks, update)
                pending = None
                save(state, log, clock())
                saved_step, saved_secs = step, clock()
        _arrive(pending, log, clock, cfg, hooks, update)
    if step != saved_step:
        save(state, log, clock())
    return state


def _arrive(
    metrics: StepMetrics | None,
    log: RunLog,
    clock: Callable[[], float],
    cfg: TrainConfig,
    hooks: Hooks,
    update: Update,
) -> None:
    """Waits for the metrics of a step and passes them on."""
    if metrics is None:
        return
    log.append(jax.device_get(metrics), clock())
    hooks.arrived(log.num_steps, log)
    last = log.last()
    text = training_text(last["cross_entropy"], log.tokens_per_s(cfg), last["load_imbalance"])
    update(_progress(cfg, log.num_steps, clock()), text)


def _start_clock(elapsed_secs: float) -> Callable[[], float]:
    start = time.monotonic() - elapsed_secs
    return lambda: time.monotonic() - start


def _due(cfg: TrainConfig, step: int, secs_since_save: float) -> bool:
    if cfg.checkpoint_steps is not None:
        return step % cfg.checkpoint_steps == 0
    return secs_since_save >= cfg.checkpoint_secs


def _save(
    manager: ocp.CheckpointManager,
    program: Program,
    configs: tuple[DecoderConfig, TrainConfig, SyncConfig],
    state: Any,
    log: RunLog,
    elapsed_secs: float,
) -> None:
    log.elapsed_secs = elapsed_secs
    extra = to_extra(log, *configs)
    checkpoints.save(manager, log.num_steps, **program.items(state), extra=extra)


def _restore(
    manager: ocp.CheckpointManager,
    program: Program,
    crc32: int,
    configs: tuple[DecoderConfig, TrainConfig, SyncConfig],
) -> tuple[Any, RunLog]:
    step = checkpoints.latest_step(manager)
    where = f"checkpoint {manager.directory / str(step)}"
    log = from_extra(checkpoints.read_extra(manager, step), where, crc32, *configs)
    check(log.num_steps == step, f"{where} has metrics of {log.num_steps} steps, want {step}")
    return program.restore(partial(checkpoints.restore, manager, step)), log
