"""Hits and transfers when a routing path deals the slots, on a model that was trained here.

    python -m experiments.train --config=configs/second_model.py --workdir=workdir/second_model
    python -m experiments.hidden_predictors --workdir=workdir/second_model
    python -m experiments.demand_slots --workdir=workdir/second_model --json=demand_slots.json

ExpertFlow's cache (`moejax/simulator/demand_slots.py`), taken apart, on held-out text: with the
path that `hidden_predictors` fitted, and with one that is always right.

    lru           the same slots for every layer, nothing predicted
    lru_quotas    slots by past use (dynamic programming), nothing predicted
    lru_demand    slots in proportion to what layers took in the past, nothing predicted
    path          the same slots for every layer, predicted experts fetched before layer 0
    path_dealt    the slots in proportion to what is predicted of the step
    true_path, true_dealt   the same of a path that is always right
"""

import pathlib
import sys
from typing import Any

from absl import flags
from rich.console import Console

from configs.hidden_predictors import get_config
from experiments import cli
from experiments.effect_steps.slots import compare, show, work_of
from experiments.flag_values import parse_fraction, parse_numbers
from experiments.hidden_steps.predict import path_scores
from experiments.hidden_steps.study import load_corpus, load_model, record_heldout
from experiments.train_steps.load_config import load_config
from moejax.core.errors import InputError, check
from moejax.core.overlay import overlay
from moejax.predictors.path import PathParams
from moejax.predictors.store import restore_predictor
from moejax.serving.prediction import check_fits
from moejax.simulator.plans import slots_of_fraction

CONFIG = flags.DEFINE_string("config", "configs/second_model.py", "the run's Python file")
WORKDIR = flags.DEFINE_string("workdir", "workdir/second_model", "folder of the training run")
BATCHES = flags.DEFINE_list("batches", ["1", "4", "16"], "tokens of a step")
EXPERTS = flags.DEFINE_list("experts_on_device", ["12.5%", "25%", "50%"], "shares in slots")
SET = cli.define_set()


def main() -> None:
    cli.check_writable(cli.JSON.value)
    cfg = overlay(get_config(), SET.value)
    batches = parse_numbers("batches", BATCHES.value)
    check(bool(EXPERTS.value), "--experts_on_device names no share")
    shares = {text: parse_fraction("experts_on_device", text) for text in EXPERTS.value}
    workdir = pathlib.Path(WORKDIR.value)
    folder = workdir / "predictors" / "path"
    check(folder.exists(), f"{folder} is not there; run experiments.hidden_predictors first")
    corpus = load_corpus(workdir, load_config(CONFIG.value).data)
    path = restore_predictor(folder)
    if not isinstance(path, PathParams):
        raise InputError(f"{folder} holds {type(path).__name__}, not a routing path")
    params, model = load_model(workdir)
    check_fits(path, model)
    held = record_heldout(params, model, corpus, cfg)
    experts = model.moe.num_experts
    scores = path_scores(path, held.routing, experts)
    figures: dict[str, Any] = {}
    for batch in batches:
        work, votes = work_of(
            held.routing.topk_idx, scores, batch, num_experts=experts, seed=cfg.seed
        )
        figures[str(batch)] = {}
        for text, share in shares.items():
            slots = slots_of_fraction(share, len(work.past), experts)
            found = compare(work, votes, slots)
            figures[str(batch)][text] = {
                name: {
                    "hit_rate": one.hit_rate,
                    "moved": one.moved,
                    "prefetched": one.prefetched,
                    "prefetched_in_vain": one.prefetched_in_vain,
                }
                for name, one in found.items()
            }
    show(Console(width=None if sys.stdout.isatty() else 110), figures)
    cli.write_report("demand_slots", "simulated", {"batch": figures})


if __name__ == "__main__":
    cli.run(main)
