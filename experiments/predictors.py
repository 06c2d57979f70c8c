"""Experts predicted from routing history alone, 1 to 4 layers ahead, on any recorded routing.

    python -m experiments.predictors --trace=deepseek_v2_lite --folds=5 \\
        --folds_dir=/tmp/predictors --json=results/predictors_deepseek.json

Sequences (prompts, files) are split into folds; every predictor is counted or fitted on the others
and judged on the fold. How long the history predictor is fitted is chosen inside the fitting
sequences (`moejax/predictors/stopping.py`). `docs/predictors.md` defines the figures, which are
pooled over the tokens of all folds: `recall` {predictor: {horizon: {m}}}, a mean over the target
layers. With `--folds_dir` finished folds are kept, and a run that was stopped goes on after them.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli, plot_file
from experiments.predictor_steps.cost import cost_of
from experiments.predictor_steps.fold import LABELS, Fold, run_fold
from experiments.predictor_steps.plot import plot
from experiments.predictor_steps.pool import pool
from experiments.traces import TRACE, open_trace
from moejax.core.errors import check
from moejax.core.overlay import overlay
from moejax.data.routing_trace import RoutingTrace
from moejax.predictors.config import FitConfig
from moejax.predictors.features import popularity
from moejax.predictors.history import HistoryParams, init_history
from moejax.predictors.recording import folds
from moejax.training.progress import progress_bar

HORIZONS = flags.DEFINE_list("horizons", ["1", "2", "3", "4"], "layers ahead, from 1 on")
FOLDS = flags.DEFINE_integer("folds", 5, "parts that the sequences are split into")
WORKDIR = flags.DEFINE_string("folds_dir", None, "folder that keeps finished folds")
CURVES = flags.DEFINE_string("recall_plot", None, "PNG to write; beside --json when not given")
SET = cli.define_set()

FIT = FitConfig(
    horizon_steps=600,
    batch=128,
    hidden=128,
    embedding=128,
    learning_rate=2e-2,
    weight_decay=0.1,
)


def parse_horizons(texts: list[str]) -> int:
    """The last of `--horizons`, which are 1, 2, ... without a gap: they are fitted together."""
    wanted = [str(h) for h in range(1, len(texts) + 1)]
    check(texts == wanted and bool(texts), f"--horizons={','.join(texts)}: not 1,2,... in order")
    return len(texts)


def run_folds(
    trace: RoutingTrace, cfg: FitConfig, horizons: int, workdir: str | None
) -> list[Fold]:
    """All folds one after another, each kept in `workdir` when it is done."""
    splits = folds(len(trace.sequence_lengths), FOLDS.value, cfg.seed)
    done = []
    for number, split in enumerate(splits):
        kept = pathlib.Path(workdir) / f"fold{number}.json" if workdir else None
        with progress_bar(f"fold {number + 1} of {len(splits)}") as update:
            done.append(run_fold(trace, split, cfg, horizons, kept, update))
    return done


def unfitted(trace: RoutingTrace, cfg: FitConfig, horizons: int) -> HistoryParams:
    """A history predictor of the sizes that the folds fit."""
    share = jnp.asarray(popularity(trace.topk_idx, trace.num_experts))
    sizes = dict(embedding=cfg.embedding, hidden=cfg.hidden, horizons=horizons)
    return init_history(jax.random.key(cfg.seed), share, vocab_size=1, **sizes)


def figures_of(
    trace: RoutingTrace, cfg: FitConfig, horizons: int, done: list[Fold]
) -> dict[str, Any]:
    """The report's figures."""
    return {
        "model": trace.meta.get("model", "unknown model"),
        "layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "tokens": trace.num_tokens,
        "sequences": len(trace.sequence_lengths),
        "folds": len(done),
        "fit": dataclasses.asdict(cfg),
        "fit_steps": [fold.steps for fold in done],
        "fit_secs": [round(fold.secs, 1) for fold in done],
        "history": cost_of(unfitted(trace, cfg, horizons), trace.top_k),
        **pool(done),
    }


def print_tables(console: Console, figures: dict[str, Any]) -> None:
    """Recall by horizon and size, then the rest of the suite at horizon 1."""
    k = str(figures["top_k"])
    recall = figures["recall"]
    sizes = list(recall["history"]["1"])
    title = f"{figures['model']}: recall@m, {figures['folds']} folds of {figures['sequences']}"
    headings = [f"@{m}" for m in sizes]
    table = Table("layers ahead", "predictor", *headings, title=title, title_justify="left")
    for horizon in recall["history"]:
        for name, label in LABELS.items():
            row = recall[name][horizon]
            table.add_row(horizon, label, *(f"{row[m]:.3f}" for m in sizes))
        table.add_section()
    console.print(table)
    batch = next(iter(figures["hot_rank"]["history"]["1"]))
    table = Table(
        "predictor", "exact set", f"wasted@{k} MiB/token", f"hot rank@{batch}",
        f"coverage@{batch}", f"its error@{batch}", title="one layer ahead", title_justify="left",
    )  # fmt: skip
    for name, label in LABELS.items():
        cells = [figures["exact_set"][name]["1"], figures["wasted_bytes"][name]["1"][k] / 2**20]
        for figure in ("hot_rank", "token_coverage", "coverage_error"):
            cells.append(figures[figure][name]["1"][batch])
        table.add_row(label, *(f"{cell:.3f}" for cell in cells))
    console.print(table)
    cost = figures["history"]
    console.print(
        f"history: {cost['parameter_bytes'] / 2**20:.2f} MiB of parameters, "
        f"{cost['multiply_adds_per_layer']:,} multiply-adds a layer and "
        f"{cost['multiply_adds_per_token']:,} a token, "
        f"{cost['us_per_layer']:.1f} us a layer at batch 1",
        highlight=False,
    )


def main() -> None:
    horizons = parse_horizons(HORIZONS.value)
    plot_path = plot_file.path_of("recall_plot", CURVES.value)
    cfg = overlay(FIT, SET.value)
    trace, _ = open_trace(TRACE.value)
    console = Console()
    done = run_folds(trace, cfg, horizons, WORKDIR.value)
    figures = figures_of(trace, cfg, horizons, done)
    print_tables(console, figures)
    cli.write_report("predictors", "numerics", figures)
    if plot_path:
        plot(figures, plot_path)
    plot_file.print_written(console, plot_path)


if __name__ == "__main__":
    cli.run(main)
