"""The run itself: batches, mesh, the loop with a recorder, and the figures of its report."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from configs.run import RunConfig
from experiments.train_steps.record import Recorder
from moejax.core.mesh import make_mesh
from moejax.data.epochs import ShuffledWindows
from moejax.data.text import Corpus
from moejax.models.config import DecoderConfig
from moejax.training.loop import TrainResult, train
from moejax.training.program import sync_bytes


def make_source(cfg: RunConfig, corpus: Corpus) -> ShuffledWindows:
    """The training text in epochs."""
    return ShuffledWindows(
        data=corpus.train.data,
        seed=cfg.train.seed,
        batch_size=cfg.train.batch_size,
        seq_len=cfg.train.seq_len,
    )


def run(
    cfg: RunConfig,
    model: DecoderConfig,
    source: ShuffledWindows,
    heldout: np.ndarray,
    workdir: pathlib.Path,
    choice: str = "",
) -> dict[str, Any]:
    """Trains to the end, or continues; returns the report's figures.

    `choice` says for the board why the dispatch has the levels and chunks that it has.
    """
    mesh = make_mesh(**dataclasses.asdict(cfg.mesh))
    with Recorder(cfg, model, mesh, heldout, workdir / "tensorboard", choice) as recorder:
        result = train(
            source,
            model,
            cfg.train,
            path=workdir / "checkpoints",
            mesh=mesh,
            sync=cfg.sync,
            show_progress=jax.process_index() == 0,
            hooks=recorder.hooks(),
        )
        score = recorder.score(result.state)
    figures: dict[str, Any] = {}
    if cfg.sync.method != "none":
        figures["sync"] = dataclasses.asdict(cfg.sync)
        figures["sync_bytes_per_step"] = sync_bytes(cfg.sync, model, cfg.train, mesh)
    return figures | {
        "num_processes": jax.process_count(),
        "mesh": dataclasses.asdict(cfg.mesh),
        "resumed_step": result.resumed_step,
        "cross_entropy": result.history["cross_entropy"].tolist(),
        "tokens_per_s": tokens_per_s(cfg, result),
        "heldout_bits": score["bits"],
        "expert_load": score["expert_load"].tolist(),
        "traffic": recorder.traffic and dataclasses.asdict(recorder.traffic),
    }


def tokens_per_s(cfg: RunConfig, result: TrainResult) -> float | None:
    """Of the steps of this call, evaluation included; None where it took fewer than two."""
    elapsed = result.history["elapsed_secs"][result.resumed_step :]
    tokens = (len(elapsed) - 1) * cfg.train.batch_size * cfg.train.seq_len
    return tokens / (elapsed[-1] - elapsed[0]) if tokens > 0 else None
