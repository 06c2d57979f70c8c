"""Runs of the comparison: a common synchronous start per seed, then each method from there.

Every run is saved when it ends, so that a comparison goes on where it stopped.
"""

import dataclasses
import json
import math
import pathlib
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import cli
from moejax.core.compat import cheap_cpu_options
from moejax.core.errors import check
from moejax.data.source import RandomWindows
from moejax.data.text import Corpus, sample_windows
from moejax.models.config import DecoderConfig
from moejax.sync.config import SyncConfig
from moejax.training.config import TrainConfig
from moejax.training.evaluate import evaluate
from moejax.training.program import exchange_of
from moejax.training.workers import (
    Exchange,
    WorkerState,
    consensus,
    init_workers,
    make_worker_step,
    spread,
    worker_shardings,
)

SYNCHRONOUS = SyncConfig(method="gradients")
HELDOUT_BYTES = 128 * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What all methods train.

    Attributes:
        cfg: of the synchronous run; `horizon_steps` counts all steps.
        common_steps: of them, those that all methods take synchronously.
    """

    model: DecoderConfig
    cfg: TrainConfig
    mesh: Mesh
    corpus: Corpus
    common_steps: int

    @property
    def steps(self) -> int:
        """Steps of a run, the common ones included."""
        assert self.cfg.horizon_steps is not None
        return self.cfg.horizon_steps

    def settings(self) -> dict[str, Any]:
        """What must be equal for results to be compared."""
        named = {"model": self.model, "cfg": dataclasses.replace(self.cfg, seed=0)}
        values: dict[str, Any] = {k: dataclasses.asdict(value) for k, value in named.items()}
        values["common_steps"], values["workers"] = self.common_steps, self.mesh.shape["data"]
        values["crc32"] = zlib.crc32(self.corpus.train.data.tobytes())
        return json.loads(json.dumps(values))


class Steps:
    """A method's compiled step, and runs of it."""

    def __init__(self, task: Task, sync: SyncConfig, learning_rate: float):
        rate = task.cfg.learning_rate * learning_rate
        self._cfg, self._task = dataclasses.replace(task.cfg, learning_rate=rate), task
        self.exchange: Exchange = exchange_of(sync, task.model)
        self._step = make_worker_step(task.model, self._cfg, task.mesh, self.exchange)
        self._compiled: jax.stages.Compiled | None = None

    def fresh(self, seed: int) -> WorkerState:
        """Random weights."""
        cfg = dataclasses.replace(self._cfg, seed=seed)
        return init_workers(self._task.model, cfg, self._task.mesh, self.exchange)

    def start_from(self, common: WorkerState) -> WorkerState:
        """Weights and moments of a synchronous run, this method's own state fresh."""
        one = jax.tree.map(lambda leaf: np.asarray(leaf[0]), common)
        one = WorkerState(
            params=one.params,
            opt_state=one.opt_state,
            gradients_state=self.exchange.gradients.init(one.params),
            weights_state=self.exchange.weights.init(one.params),
        )
        task = self._task
        return spread(one, worker_shardings(task.model, self._cfg, task.mesh, self.exchange))

    def run(
        self, state: WorkerState, seed: int, first: int, last: int
    ) -> tuple[WorkerState, list[float]]:
        """Steps `first` to `last` of a run; the state after them, and their nats per byte."""
        shape = dict(batch_size=self._cfg.batch_size, seq_len=self._cfg.seq_len)
        source = RandomWindows(data=self._task.corpus.train.data, seed=seed, **shape)
        history = []
        batches = source.batches(first, np.arange(self._cfg.batch_size))
        for i, tokens in zip(range(first, last), batches, strict=False):
            batch = jnp.asarray(tokens), jnp.float32(i / self._task.steps)
            if self._compiled is None:
                # At XLA's default half of a short run would be compilation.
                options: Any = cheap_cpu_options(1)
                self._compiled = self._step.lower(state, *batch).compile(options)
            state, metrics = self._compiled(state, *batch)
            history.append(metrics.cross_entropy)
        return state, [float(one) for one in jax.device_get(history)]


def run_method(task: Task, steps: Steps, common: WorkerState, seed: int) -> dict[str, Any]:
    """Held-out nats per byte of the mean weights at the end, nats of every step, seconds."""
    begin = time.perf_counter()
    state, train = steps.run(steps.start_from(common), seed, task.common_steps, task.steps)
    seconds = time.perf_counter() - begin
    return {"heldout": score(task, state), "train": train, "seconds": seconds}


def score(task: Task, state: WorkerState) -> float:
    """Nats per byte on fixed windows of held-out text."""
    data, seq_len = task.corpus.heldout.data, task.cfg.seq_len
    starts = sample_windows(len(data), seq_len, HELDOUT_BYTES)
    params = jax.device_put(consensus(state), jax.devices()[0])
    bits, _ = evaluate(params, data, starts, task.model, seq_len=seq_len, batch_size=64)
    return bits * math.log(2)


@dataclasses.dataclass(frozen=True)
class Results:
    """A folder with a JSON file per run."""

    folder: pathlib.Path
    settings: dict[str, Any]

    def _path(self, name: str, seed: int) -> pathlib.Path:
        return self.folder / f"{name.replace(', ', '-').replace(' ', '_')}.{seed}.json"

    def load(self, name: str, seed: int, method: dict[str, Any]) -> dict[str, Any] | None:
        """A run that ended; None where there is none. Raises `InputError` for other settings."""
        path = self._path(name, seed)
        if not path.exists():
            return None
        stored = json.loads(path.read_text())
        same = stored["settings"] == self.settings and stored["method"] == method
        check(same, f"{path} is of another comparison; choose another --workdir")
        return stored["run"]

    def save(self, name: str, seed: int, method: dict[str, Any], run: dict[str, Any]) -> None:
        """Writes a run, whole or not at all."""
        value = {"settings": self.settings, "method": method, "run": run}
        cli.write_text(self._path(name, seed), json.dumps(value))
