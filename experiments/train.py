"""Train a mixture of experts on a mesh, in one process or many, and go on where a run stopped.

    python -m experiments.train --config=configs/byte_moe.py --workdir=workdir/byte_moe
    python -m experiments.train --config=... --set mesh.data=2 --set mesh.expert=4 --data=folder

Checkpoints go to `--workdir`/checkpoints, tensorboard's event files to `--workdir`/tensorboard.
Several processes are the same command with the flags of `experiments/train_steps/launch.py`; all
need to see the same `--workdir`. See docs/training.md.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from configs.run import RunConfig
from experiments import cli
from experiments.train_steps import launch
from experiments.train_steps.load_config import load_config
from experiments.train_steps.record import Recorder
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.core.overlay import overlay
from moejax.data.epochs import ShuffledWindows
from moejax.data.text import Corpus, load_corpus
from moejax.models.config import DecoderConfig
from moejax.training.heldout import heldout_starts
from moejax.training.loop import TrainResult, train
from moejax.training.sharding import check_mesh

CONFIG = flags.DEFINE_string("config", "configs/byte_moe.py", "Python file with get_config()")
WORKDIR = flags.DEFINE_string("workdir", "workdir/train", "folder for checkpoints and metrics")
DATA = flags.DEFINE_string("data", None, "text file or folder; default: the standard library")
SET = cli.define_set()
flags.adopt_module_key_flags(launch)


def main() -> None:
    check(WORKDIR.value != "", "--workdir is empty; name a folder")
    workdir = pathlib.Path(WORKDIR.value)
    cli.check_writable(cli.JSON.value)
    cli.check_writable(str(workdir / "tensorboard" / "events"))
    cfg = overlay(load_config(CONFIG.value), SET.value)
    if DATA.value is not None:
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=DATA.value))
    launch.check_flags(cfg.mesh.size)
    model, corpus = cfg.model.decoder(), load_corpus(cfg.data)
    source = make_source(cfg, corpus)
    heldout_starts(corpus.heldout.data, cfg.train, cfg.eval_batches)
    sizes = dataclasses.asdict(cfg.mesh)
    # No devices yet: what does not divide is refused before the other processes are joined.
    planned = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    check_mesh(planned, model, cfg.train)  # pyrefly: ignore[bad-argument-type]
    launch.join(cfg.mesh.size)
    figures = run(cfg, model, source, corpus.heldout.data, workdir)
    if jax.process_index() == 0:
        cli.write_report("train", "time", figures)


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
) -> dict[str, Any]:
    """Trains to the end, or continues; returns the report's figures."""
    mesh = make_mesh(**dataclasses.asdict(cfg.mesh))
    with Recorder(cfg, model, mesh, heldout, workdir / "tensorboard") as recorder:
        result = train(
            source,
            model,
            cfg.train,
            path=workdir / "checkpoints",
            mesh=mesh,
            show_progress=jax.process_index() == 0,
            hooks=recorder.hooks(),
        )
        score = recorder.score(result.state)
    return {
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


if __name__ == "__main__":
    cli.run(main)
