"""What predicting experts is worth in tokens/s, on a model that was trained here.

    python -m experiments.train --config=configs/second_model.py --workdir=workdir/second_model
    python -m experiments.hidden_predictors --workdir=workdir/second_model
    python -m experiments.predictor_effect --workdir=workdir/second_model --json=effect.json

The predictors that `hidden_predictors` fitted, on held-out text, twice. *Simulated*: offloaded
steps replay the model's own routing with each predictor's own predictions, at the sizes of a layer
of a named real model, on rows of the hardware table; the number of prefetches follows from how
often a predictor's r-th guess is right (`costmodel.admission.best_lanes`). *Measured*: the engine
decodes the model on this machine with each of them, in turns. What to expect: docs/second_model.md.
"""

import pathlib
import sys
from typing import Any

from absl import flags
from rich.console import Console

from configs.hidden_predictors import get_config
from experiments import cli, plot_file
from experiments.effect_steps import replay, report
from experiments.effect_steps.study import measure_all, read_fitted, simulate_all
from experiments.flag_values import parse_fraction, parse_numbers
from experiments.hidden_steps.predict import score_all
from experiments.hidden_steps.study import load_corpus, load_model, record_all
from experiments.train_steps.load_config import load_config
from moejax.core.errors import check
from moejax.core.overlay import overlay
from moejax.costmodel.hardware import get_machine
from moejax.serving import prediction

CONFIG = flags.DEFINE_string("config", "configs/second_model.py", "the run's Python file")
WORKDIR = flags.DEFINE_string("workdir", "workdir/second_model", "folder of the training run")
HARDWARE = flags.DEFINE_list(
    "hardware", ["RTX4090-PCIe4", "A100-PCIe4", "H100-PCIe5"], "rows of moejax.costmodel.hardware"
)
BATCHES = flags.DEFINE_list("batches", ["1", "4", "16"], "tokens of a step")
CONTEXTS = flags.DEFINE_list("contexts", ["1024", "32768"], "positions that attention reads")
EXPERTS = flags.DEFINE_string("experts_on_device", "25%", "share of all experts that slots hold")
DECODED = flags.DEFINE_list("decode_batches", ["1", "4"], "batch sizes that the engine decodes")
LANES = flags.DEFINE_integer("prefetch_lanes", 4, "of the measured predictors", lower_bound=1)
STEPS = flags.DEFINE_integer("timed_steps", 64, "of each arm of the engine", lower_bound=3)
PLOT = flags.DEFINE_string("plot", None, "PNG to write; beside --json when not given")
SET = cli.define_set()


def main() -> None:
    plot_path = plot_file.path_of("plot", PLOT.value)
    cfg = overlay(get_config(), SET.value)
    batches = parse_numbers("batches", BATCHES.value)
    contexts = parse_numbers("contexts", CONTEXTS.value)
    decoded = parse_numbers("decode_batches", DECODED.value)
    fraction = parse_fraction("experts_on_device", EXPERTS.value)
    check(bool(HARDWARE.value), "--hardware names no row")
    for name in HARDWARE.value:
        get_machine(name)
    workdir = pathlib.Path(WORKDIR.value)
    console = Console(width=None if sys.stdout.isatty() else 110)
    corpus = load_corpus(workdir, load_config(CONFIG.value).data)
    fitted = read_fitted(workdir / "predictors")
    params, model = load_model(workdir)
    for one in fitted.values():
        prediction.check_fits(one, model)
    train, held = record_all(params, model, corpus, cfg)
    routers = prediction.stack_routers(params, model)
    scores = score_all(fitted, train.routing, held, routers, model)
    del train
    simulated = simulate_all(
        held.routing.topk_idx, scores, HARDWARE.value, batches, contexts,
        num_experts=model.moe.num_experts, fraction=fraction, seed=cfg.seed,
    )  # fmt: skip
    report.print_simulated(console, simulated)
    measured = measure_all(
        params, model, fitted, held.routing.token_ids, decoded,
        fraction=fraction, lanes=LANES.value, steps=STEPS.value,
    )  # fmt: skip
    report.print_measured(console, measured)
    figures: dict[str, Any] = {
        "sizes": replay.QWEN3.name,
        "experts_on_device": fraction,
        "simulated": simulated,
        "measured": measured,
    }
    cli.write_report("predictor_effect", "time", figures)
    if plot_path:
        report.plot(figures, plot_path)
    plot_file.print_written(console, plot_path)


if __name__ == "__main__":
    cli.run(main)
