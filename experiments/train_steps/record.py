"""What a run records: metrics of its steps, held-out scores, expert load, bytes on the wire."""

import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from configs.run import RunConfig
from experiments.train_steps import board
from moejax.aot.hlo import parse_hlo
from moejax.models.config import DecoderConfig
from moejax.routing.losses import load_imbalance
from moejax.training.heldout import score_heldout
from moejax.training.loop import Hooks
from moejax.training.program import State, weights
from moejax.training.run_log import RunLog
from moejax.training.traffic import StepTraffic, step_traffic


class Recorder:
    """The hooks of a run. All processes compute, process 0 writes. A context manager."""

    def __init__(
        self,
        cfg: RunConfig,
        model: DecoderConfig,
        mesh: Mesh,
        heldout: np.ndarray,
        folder: pathlib.Path,
        choice: str = "",
    ):
        self._cfg, self._model, self._mesh, self._heldout = cfg, model, mesh, heldout
        self._folder, self._board, self._choice = folder, None, choice
        self.traffic: StepTraffic | None = None  # None until a step is compiled

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._board is not None:
            self._board.close()

    def hooks(self) -> Hooks:
        """What the loop calls."""
        return Hooks(compiled=self._compiled, dispatched=self._dispatched, arrived=self._arrived)

    def score(self, state: State) -> dict[str, Any]:
        """Bits per token of the held-out text, and the expert load [L, E] on it."""
        nats, load = score_heldout(
            weights(state),
            self._heldout,
            self._model,
            self._cfg.train,
            self._mesh,
            num_batches=self._cfg.eval_batches,
        )
        return {"bits": board.bits(nats), "expert_load": load}

    def _compiled(self, step: int, program: jax.stages.Compiled) -> None:
        self.traffic = step_traffic(parse_hlo(program.as_text() or ""), self._mesh)
        if jax.process_index() == 0:
            self._board = board.open_board(self._folder, step)
            if self._choice:
                board.write_text(self._board, step, "dispatch/choice", self._choice)

    def _dispatched(self, step: int, state: State) -> None:
        if step % self._cfg.eval_steps:
            return
        score = self.score(state)
        if self._board is not None:
            load = score["expert_load"]
            imbalance = np.asarray(load_imbalance(jax.numpy.asarray(load)))
            board.write_metrics(self._board, step, {"heldout/bits": score["bits"]})
            by_layer = {f"load/imbalance_{i}": float(one) for i, one in enumerate(imbalance)}
            board.write_metrics(self._board, step, by_layer)
            board.write_load(self._board, step, load)

    def _arrived(self, step: int, log: RunLog) -> None:
        if self._board is None or step % self._cfg.log_steps:
            return
        metrics = {f"train/{name}": value for name, value in log.last().items()}
        metrics["train/tokens_per_s"] = log.tokens_per_s(self._cfg.train)
        assert self.traffic is not None
        metrics |= {f"bytes/{axis}": float(n) for axis, n in self.traffic.nbytes.items()}
        board.write_metrics(self._board, step, metrics)
