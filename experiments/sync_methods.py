"""Training with less communication, method by method: held-out loss and bytes sent.

    python -m experiments.sync_methods --workdir=workdir/sync_methods \
        --json=results/sync_methods.json --losses_plot=results/sync_methods.png

Eight workers (CPU devices) train a byte-level mixture of experts with equal tokens, data order and
initial weights per seed; the first `--common_steps` are synchronous in all runs. Controls without
feedback say what feedback is worth. Losses are those of the mean of the workers' weights; bytes are
those that one worker sends, from the schedules that run (`moejax.sync`). Started again with the
same `--workdir`, the comparison goes on with the runs that are missing. See docs/sync.md.
"""

import dataclasses
import pathlib
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import track

from configs.model import ModelConfig
from experiments import cli
from experiments.sync_steps.compare import SYNCHRONOUS, Results, Steps, Task, run_method
from experiments.sync_steps.methods import EXACT_EVERY, METHODS, PERIOD
from experiments.sync_steps.report import draw, figures_of, table_of
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.data.text import TextConfig, load_corpus
from moejax.routing.config import RouterConfig
from moejax.training.config import TrainConfig
from moejax.training.program import sync_bytes

WORKDIR = flags.DEFINE_string("workdir", "workdir/sync_methods", "folder of results of runs")
STEPS = flags.DEFINE_integer("steps", 200, "steps of each run, all counted", lower_bound=1)
COMMON = flags.DEFINE_integer("common_steps", 120, "of them synchronous in all", lower_bound=0)
BATCH = flags.DEFINE_integer("sequences", 8, "of 64 bytes per worker and step", lower_bound=1)
RATE = flags.DEFINE_float("learning_rate", 1e-2, "of the synchronous run", lower_bound=0.0)
SEEDS = flags.DEFINE_integer("seeds", 3, "runs per method", lower_bound=1)
FIRST_SEED = flags.DEFINE_integer("first_seed", 0, "of them", lower_bound=0)
NAMES = flags.DEFINE_list("methods", None, "some of the methods; default: all")
DATA = flags.DEFINE_string("text", None, "text file or folder; default: the standard library")
PLOT = flags.DEFINE_string("losses_plot", None, "where to write the pictures, as PNG")
WORKERS = 8
MODEL = ModelConfig(
    num_layers=2,
    d_model=64,
    d_ff=64,
    router=RouterConfig(num_experts=8, top_k=2),
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
)


def make_task() -> Task:
    """What the flags say."""
    corpus = load_corpus(TextConfig(path=DATA.value) if DATA.value else TextConfig())
    cfg = TrainConfig(
        batch_size=WORKERS * BATCH.value,
        seq_len=64,
        horizon_steps=STEPS.value,
        learning_rate=RATE.value,
        final_fraction=0.0,
    )
    return Task(
        model=MODEL.decoder(),
        cfg=cfg,
        mesh=make_mesh(data=WORKERS),
        corpus=corpus,
        common_steps=COMMON.value,
    )


def run_all(task: Task, names: list[str], results: Results) -> dict[str, list[dict[str, Any]]]:
    """Every method with every seed, method by method so that each is compiled once."""
    seeds = range(FIRST_SEED.value, FIRST_SEED.value + SEEDS.value)
    common, start, compiled = {}, Steps(task, SYNCHRONOUS, 1.0), {}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    todo = [(name, seed) for name in names for seed in seeds]
    for name, seed in track(todo, description="training", transient=True):
        method, key = METHODS[name], dataclasses.asdict(METHODS[name])
        run = results.load(name, seed, key)
        if run is None:
            if seed not in common:
                common[seed] = start.run(start.fresh(seed), seed, 0, task.common_steps)[0]
            if name not in compiled:
                compiled = {name: Steps(task, method.sync, method.learning_rate)}
            run = run_method(task, compiled[name], common[seed], seed)
            results.save(name, seed, key, run)
            print(f"{name}, seed {seed}: {run['heldout']:.4f}; {run['seconds']:.0f} s", flush=True)
        runs[name].append(run)
    return runs


def main() -> None:
    cli.check_writable(cli.JSON.value)
    cli.check_writable(PLOT.value)
    names = NAMES.value or list(METHODS)
    for name in names:
        check(name in METHODS, f"--methods: {name!r} is not one of {list(METHODS)}")
    check("synchronous" in names, "--methods: all are compared with 'synchronous', name it too")
    check(COMMON.value < STEPS.value, f"--common_steps={COMMON.value} must be below --steps")
    cli.use_cpu_devices(WORKERS)
    task = make_task()
    results = Results(pathlib.Path(WORKDIR.value), task.settings())
    runs = run_all(task, names, results)
    sent = {name: sync_bytes(METHODS[name].sync, task.model, task.cfg, task.mesh) for name in names}
    figures = figures_of(runs, sent, task.common_steps / task.steps)
    Console().print(table_of(figures))
    stated = {
        "steps": task.steps,
        "common_steps": task.common_steps,
        "bytes_of_text_per_step": task.cfg.batch_size * task.cfg.seq_len,
        "learning_rate": task.cfg.learning_rate,
        "period": PERIOD,
        "exact_every": EXACT_EVERY,
        "methods": {name: dataclasses.asdict(METHODS[name]) for name in names},
    }
    cli.write_report("sync_methods", "numerics", figures | stated)
    if PLOT.value:
        cli.write_bytes(PLOT.value, draw(figures, task.common_steps))


if __name__ == "__main__":
    cli.run(main)
