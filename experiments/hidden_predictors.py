"""Predictors from hidden states and tokens, on a model that was trained here.

    python -m experiments.train --config=configs/second_model.py --workdir=workdir/second_model
    python -m experiments.hidden_predictors --workdir=workdir/second_model --json=hidden.json

Scores the model beside n-grams, records what its layers see on training files and on held-out ones,
fits LLaPor, the learned look-ahead and history to the same number of bytes, the pre-attention and
the routing-path predictor, and compares all by layer group, with the cost of one evaluation. Fitted
predictors go to `--workdir`/predictors. Settings: `configs/hidden_predictors.py`; what to expect:
docs/second_model.md.
"""

import pathlib
import sys

from absl import flags
from rich.console import Console

from configs.hidden_predictors import get_config
from experiments import cli, plot_file
from experiments.hidden_steps import report
from experiments.hidden_steps.study import study
from experiments.train_steps.load_config import load_config
from moejax.core.errors import check
from moejax.core.overlay import overlay

CONFIG = flags.DEFINE_string("config", "configs/second_model.py", "the run's Python file")
WORKDIR = flags.DEFINE_string("workdir", "workdir/second_model", "folder of the training run")
PLOT = flags.DEFINE_string("plot", None, "PNG to write; beside --json when not given")
SET = cli.define_set()


def main() -> None:
    check(WORKDIR.value != "", "--workdir is empty; name the folder of a training run")
    plot_path = plot_file.path_of("plot", PLOT.value)
    cfg = overlay(get_config(), SET.value)
    data = load_config(CONFIG.value).data
    console = Console(width=None if sys.stdout.isatty() else 110)  # a log file has no width
    figures = study(pathlib.Path(WORKDIR.value), data, cfg, console)
    report.print_tables(console, figures)
    cli.write_report("hidden_predictors", "time", figures)
    if plot_path:
        report.plot(figures, plot_path)
    plot_file.print_written(console, plot_path)


if __name__ == "__main__":
    cli.run(main)
