"""Train a mixture of experts on a mesh, in one process or many, and go on where a run stopped.

    python -m experiments.train --config=configs/byte_moe.py --workdir=workdir/byte_moe
    python -m experiments.train --config=... --set mesh.data=2 --set mesh.expert=4 --data=folder

Checkpoints go to `--workdir`/checkpoints, tensorboard's event files to `--workdir`/tensorboard.
Several processes are the same command with the flags of `experiments/train_steps/launch.py`; all
need to see the same `--workdir`. See docs/training.md.
"""

import dataclasses
import pathlib

import jax
from absl import flags

from experiments import cli
from experiments.train_steps import launch
from experiments.train_steps.advised import follow_calibration
from experiments.train_steps.load_config import load_config
from experiments.train_steps.load_data import load_data, with_path
from experiments.train_steps.run import make_source, run
from moejax.core.errors import check
from moejax.core.overlay import overlay
from moejax.costmodel.advice import read_calibration
from moejax.training.heldout import heldout_starts
from moejax.training.program import check_program

CONFIG = flags.DEFINE_string("config", "configs/byte_moe.py", "Python file with get_config()")
WORKDIR = flags.DEFINE_string("workdir", "workdir/train", "folder for checkpoints and metrics")
DATA = flags.DEFINE_string("data", None, "text file or folder; default: the standard library")
CALIBRATION = flags.DEFINE_string(
    "calibration", None, "JSON of scripts.calibrate: chooses levels and chunks of hierarchical"
)
SET = cli.define_set()
flags.adopt_module_key_flags(launch)


def main() -> None:
    check(WORKDIR.value != "", "--workdir is empty; name a folder")
    workdir = pathlib.Path(WORKDIR.value)
    cli.check_writable(cli.JSON.value)
    cli.check_writable(str(workdir / "tensorboard" / "events"))
    cfg = overlay(load_config(CONFIG.value), SET.value)
    if DATA.value is not None:
        cfg = dataclasses.replace(cfg, data=with_path(cfg.data, DATA.value))
    advice = None
    if CALIBRATION.value is not None:
        cfg, advice = follow_calibration(cfg, read_calibration(CALIBRATION.value))
    launch.check_flags(cfg.mesh.size)
    model, corpus = cfg.model.decoder(), load_data(cfg, workdir)
    source = make_source(cfg, corpus)
    heldout_starts(corpus.heldout.data, cfg.train, cfg.eval_batches)
    sizes = dataclasses.asdict(cfg.mesh)
    # No devices yet: what does not divide is refused before the other processes are joined.
    planned = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    check_program(planned, model, cfg.train, cfg.sync)
    launch.join(cfg.mesh.size)
    choice = "" if advice is None else advice.explain()
    figures = run(cfg, model, source, corpus.heldout.data, workdir, choice)
    if jax.process_index() == 0:
        if advice is not None:
            print(choice)
            figures["dispatch_choice"] = advice.figures()
        cli.write_report("train", "time", figures)


if __name__ == "__main__":
    cli.run(main)
