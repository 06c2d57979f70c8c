"""Training that makes experts easier to offload, and what it costs: the same model, several losses.

    python -m experiments.offloadable_training --workdir=workdir/offloadable --json=offloadable.json

Trains the quickstart's model once for every loss below, for the same steps on the same batches, and
measures on held-out files: bits per byte, how well the next gate foresees a layer's choices
(recall@k), local routing consistency SRP(16), and the hit rate of a least-recently-used cache of
twice the experts that a token chooses. Started again after an interruption it continues.
"""

import pathlib

from absl import flags
from rich.console import Console
from rich.table import Table

from configs.quickstart import get_config
from experiments import cli, plot_file
from experiments.plot_file import png_of
from experiments.train_steps.offloadable import ARMS, RHO, WINDOW, run_arm
from moejax.core.errors import check
from moejax.core.overlay import overlay
from moejax.data.text import load_corpus

STEPS = flags.DEFINE_integer("steps", 600, "of every run", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "workdir/offloadable", "folder for the runs")
PLOT = flags.DEFINE_string("plot", None, "PNG to write; beside --json when not given")
SET = cli.define_set()


def print_table(console: Console, runs: dict[str, dict[str, float]]) -> None:
    """A row for every loss."""
    names = [*next(iter(runs.values()))]
    table = Table("loss", *names, title_justify="left")
    for arm, one in runs.items():
        table.add_row(arm, *(f"{one[name]:.3f}" for name in names))
    console.print(table)


def plot(runs: dict[str, dict[str, float]], path: str) -> None:
    """What is gained against the bits that it costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, name in zip(axes, ("next_gate_recall", "lru", "srp"), strict=True):
        for arm, one in runs.items():
            axis.plot(one["heldout_bits"], one[name], "o", label=arm)
        axis.set_xlabel("held-out bits per byte")
        axis.set_title(name, fontsize="medium")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize="small")
    cli.write_bytes(path, png_of(figure, dpi=130))


def main() -> None:
    check(WORKDIR.value != "", "--workdir is empty; name a folder")
    workdir = pathlib.Path(WORKDIR.value)
    plot_path = plot_file.path_of("plot", PLOT.value)
    cfg = overlay(get_config(), SET.value)
    cli.use_cpu_cores(2)
    corpus, console = load_corpus(cfg.data), Console()
    runs = {}
    for arm in ARMS:
        console.rule(arm)
        runs[arm] = run_arm(cfg, corpus, arm, STEPS.value, workdir)
    print_table(console, runs)
    figures = {"steps": STEPS.value, "window": WINDOW, "rho": RHO, "runs": runs}
    cli.write_report("offloadable_training", "numerics", figures)
    if plot_path:
        plot(runs, plot_path)
    plot_file.print_written(console, plot_path)


if __name__ == "__main__":
    cli.run(main)
