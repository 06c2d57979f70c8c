"""The training loop: data by step, metrics of every step, checkpoints, and resuming.

A run that is killed at any moment and started again continues from its latest complete checkpoint
as if nothing had happened: the batch is a function of (seed, step), and the checkpoint carries the
weights, the optimizer, the seconds spent so far and the metrics of every step.
"""

import dataclasses
import pathlib
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from moejax.checkpoint import manager as checkpoints
from moejax.checkpoint.config_json import difference, from_json, to_json
from moejax.core.errors import check
from moejax.data.text import batch
from moejax.models.config import DecoderConfig
from moejax.training.config import TrainConfig
from moejax.training.progress import progress_bar, training_text
from moejax.training.sharding import check_mesh, state_shardings
from moejax.training.state import StepMetrics, TrainState, init_state, train_step

COLUMNS = (*(field.name for field in dataclasses.fields(StepMetrics)), "elapsed_secs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run.

    Attributes:
        history: float64 [steps] per column of `COLUMNS`, resumed steps included. `elapsed_secs` is
            when the step's metrics arrived, in seconds of training.
        resumed_step: the step of the checkpoint that this call started from, 0 for none.
    """

    state: TrainState
    history: dict[str, np.ndarray]
    resumed_step: int


def train(
    data: np.ndarray,
    model: DecoderConfig,
    cfg: TrainConfig,
    *,
    path: str | pathlib.Path,
    mesh: Mesh | None = None,
    show_progress: bool = False,
) -> TrainResult:
    """Trains on `data` uint8 [N], or resumes the run whose checkpoints are in folder `path`.

    With a mesh, sequences are sharded over `data` and `expert`, experts over `expert`; a run may be
    continued on another mesh. Returns at once when that run is finished. Raises `InputError` when
    the checkpoints are of another model, run or corpus, are damaged, or would not fit on the disk.
    """
    have, want = len(data), cfg.batch_size * (cfg.seq_len + 1)
    check(have >= want, f"corpus too small: {have} training bytes, one batch wants {want}")
    if mesh is not None:
        check_mesh(mesh, model, cfg)
    abstract = _abstract_state(model, cfg, mesh)
    checkpoints.check_free_disk(path, abstract)
    with checkpoints.open_manager(path) as manager:
        if manager.latest_step() is None:
            state, log = init_state(model, cfg, mesh), _Log(crc32=zlib.crc32(data.tobytes()))
        else:
            state, log = _restore(manager, abstract, data, model, cfg)
        first = log.num_steps
        if _progress(cfg, first, log.elapsed_secs) < 1:
            state = _run(state, log, data, model, cfg, mesh, manager, show_progress)
        checkpoints.finish(manager)
    history = {name: np.array(values) for name, values in log.columns.items()}
    return TrainResult(state=state, history=history, resumed_step=first)


@dataclasses.dataclass(kw_only=True)
class _Log:
    """What a checkpoint carries besides arrays; grows as the run goes on."""

    crc32: int
    elapsed_secs: float = 0.0
    columns: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {name: [] for name in COLUMNS}
    )

    @property
    def num_steps(self) -> int:
        return len(self.columns["loss"])

    def append(self, metrics: StepMetrics, elapsed_secs: float) -> None:
        for name, value in jax.device_get(metrics).__dict__.items():
            self.columns[name].append(float(value))
        self.columns["elapsed_secs"].append(elapsed_secs)

    def tokens_per_s(self, cfg: TrainConfig, over: int = 20) -> float:
        times = self.columns["elapsed_secs"][-over - 1 :]
        tokens = (len(times) - 1) * cfg.batch_size * cfg.seq_len
        return tokens / (times[-1] - times[0]) if tokens else 0.0


def _progress(cfg: TrainConfig, step: int, elapsed_secs: float) -> float:
    """Share of the run that is done after `step` steps and `elapsed_secs`."""
    if cfg.horizon_steps is not None:
        return step / cfg.horizon_steps
    return elapsed_secs / cfg.horizon_secs


def _run(
    state: TrainState,
    log: _Log,
    data: np.ndarray,
    model: DecoderConfig,
    cfg: TrainConfig,
    mesh: Mesh | None,
    manager: ocp.CheckpointManager,
    show_progress: bool,
) -> TrainState:
    """Steps to the end of the horizon; the last checkpoint is on its way when this returns."""
    step = saved_step = log.num_steps
    shape = dict(batch_size=cfg.batch_size, seq_len=cfg.seq_len)
    tokens, done = batch(data, cfg.seed, step, **shape), np.float32(0)
    # Compiled before the clock starts: only training counts against the horizon.
    run_step = train_step.lower(state, tokens, done, model=model, cfg=cfg, mesh=mesh).compile()
    clock = _start_clock(log.elapsed_secs)
    saved_secs = clock()
    pending: StepMetrics | None = None

    def arrive(metrics: StepMetrics | None) -> None:
        if metrics is None:
            return
        log.append(metrics, clock())
        text = training_text(
            log.columns["cross_entropy"][-1],
            log.tokens_per_s(cfg),
            log.columns["load_imbalance"][-1],
        )
        update(_progress(cfg, log.num_steps, clock()), text)

    start = _progress(cfg, step, log.elapsed_secs)
    with progress_bar("training", start=start, show=show_progress) as update:
        while (done := _progress(cfg, step, clock())) < 1:
            tokens = batch(data, cfg.seed, step, **shape)
            state, metrics = run_step(state, tokens, np.float32(done))
            step += 1
            # One step late, so that the device never waits for this thread.
            arrive(pending)
            pending = metrics
            if _due(cfg, step, clock() - saved_secs):
                arrive(pending)
                pending = None
                _save(manager, state, log, model, cfg, clock())
                saved_step, saved_secs = step, clock()
        arrive(pending)
    if step != saved_step:
        _save(manager, state, log, model, cfg, clock())
    return state


def _start_clock(elapsed_secs: float) -> Callable[[], float]:
    start = time.monotonic() - elapsed_secs
    return lambda: time.monotonic() - start


def _due(cfg: TrainConfig, step: int, secs_since_save: float) -> bool:
    if cfg.checkpoint_steps is not None:
        return step % cfg.checkpoint_steps == 0
    return secs_since_save >= cfg.checkpoint_secs


def _abstract_state(model: DecoderConfig, cfg: TrainConfig, mesh: Mesh | None) -> TrainState:
    """Shapes and shardings of the state on the mesh, or on the default device."""
    state = jax.eval_shape(lambda: init_state(model, cfg))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: one, state) if mesh is None else state_shardings(state, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        where,
    )


def _save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    log: _Log,
    model: DecoderConfig,
    cfg: TrainConfig,
    elapsed_secs: float,
) -> None:
    log.elapsed_secs = elapsed_secs
    extra = {"model": to_json(model), "train": to_json(cfg), "log": dataclasses.asdict(log)}
    optimizer = {"opt_state": state.opt_state, "step": state.step}
    checkpoints.save(manager, log.num_steps, params=state.params, optimizer=optimizer, extra=extra)


def _restore(
    manager: ocp.CheckpointManager,
    abstract: TrainState,
    data: np.ndarray,
    model: DecoderConfig,
    cfg: TrainConfig,
) -> tuple[TrainState, _Log]:
    step = checkpoints.latest_step(manager)
    extra = checkpoints.read_extra(manager, step)
    where = f"checkpoint {manager.directory / str(step)}"
    log = _check_same_run(extra, where, zlib.crc32(data.tobytes()), model, cfg)
    check(log.num_steps == step, f"{where} has metrics of {log.num_steps} steps, want {step}")
    optimizer = {"opt_state": abstract.opt_state, "step": abstract.step}
    restored = checkpoints.restore(
        manager, step, {"params": abstract.params, "optimizer": optimizer}
    )
    return TrainState(params=restored["params"], **restored["optimizer"]), log


def _parse_log(value: Any, where: str) -> _Log:
    fields = {field.name for field in dataclasses.fields(_Log)}
    good = isinstance(value, dict) and value.keys() == fields and isinstance(value["columns"], dict)
    good = good and value["columns"].keys() == set(COLUMNS)
    good = good and all(isinstance(column, list) for column in value["columns"].values())
    good = good and len({len(column) for column in value["columns"].values()}) == 1
    check(good, f"{where}: its log does not hold {sorted(fields)} with a list for each metric")
    return _Log(**value)


def _check_same_run(
    extra: dict[str, Any], where: str, crc32: int, model: DecoderConfig, cfg: TrainConfig
) -> _Log:
    for name in ("model", "train", "log"):
        check(name in extra, f"{where} is not a training run's: its extra has no {name!r}")
    stored_model = from_json(DecoderConfig, extra["model"], f"{where}: model")
    stored_cfg = from_json(TrainConfig, extra["train"], f"{where}: train")
    # How often a run saves has no effect on it.
    stored_cfg = dataclasses.replace(
        stored_cfg, checkpoint_secs=cfg.checkpoint_secs, checkpoint_steps=cfg.checkpoint_steps
    )
    for name, stored, wanted in (("model", stored_model, model), ("train", stored_cfg, cfg)):
        check(
            stored == wanted,
            f"{where} is of another run, {name}: {difference(stored, wanted)}; "
            "continue with its config or choose another folder",
        )
    log = _parse_log(extra["log"], where)
    check(log.crc32 == crc32, f"{where} was trained on other data (crc32 {log.crc32}, not {crc32})")
    return log
