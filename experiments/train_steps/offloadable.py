"""Runs of `experiments/offloadable_training.py`: one model, several losses, what each leads to."""

import dataclasses
import pathlib
from typing import Any

from configs.quickstart import QuickstartConfig
from experiments.quickstart_steps.predict import heldout_trace, heldout_windows, record
from experiments.quickstart_steps.train import run_training
from moejax.data.text import Corpus
from moejax.predictors.baselines import next_gate_scores
from moejax.predictors.evaluate import evaluate
from moejax.serving.prediction import stack_routers
from moejax.simulator.consistency import entries, measure_consistency
from moejax.training.config import TrainConfig
from moejax.training.offloading import OffloadingConfig

WINDOW, RHO = 16, 2  # tokens of SRP's segments; cache over top-k

ARMS: dict[str, dict[str, Any]] = {
    "batch_balance": {},
    "sequence_balance": {"offloading": OffloadingConfig(balance_over="sequence")},
    "no_balance": {"load_balancing_weight": 0.0},
    "predictable": {"offloading": OffloadingConfig(predictability_weight=0.3)},
}


def arm_config(cfg: TrainConfig, arm: str, steps: int) -> TrainConfig:
    """The run of `arm`: what differs is its loss."""
    return dataclasses.replace(cfg, horizon_steps=steps, **ARMS[arm])


def run_arm(
    cfg: QuickstartConfig, corpus: Corpus, arm: str, steps: int, workdir: pathlib.Path
) -> dict[str, float]:
    """Trains, or continues, and measures."""
    cfg = dataclasses.replace(cfg, train=arm_config(cfg.train, arm, steps))
    trained = run_training(cfg, workdir / arm, corpus=corpus)
    params, model = trained.result.state.params, trained.model
    windows, files = heldout_windows(corpus.heldout, cfg.predict)
    held = record(params, model, windows, cfg.predict, f"recording {arm}", True)
    router = model.moe.router
    foreseen = evaluate(
        next_gate_scores(held, stack_routers(params, model), router), held, expert_bytes=0
    )
    trace = heldout_trace(held, model, files)
    consistency = measure_consistency(trace, [WINDOW])
    size = entries(RHO, router.top_k, router.num_experts)
    load = trained.expert_load
    return {
        "heldout_bits": trained.bits["model"],
        "next_gate_recall": foreseen.mean_recall(router.top_k),
        "srp": float(consistency.segments[WINDOW].srp),
        "lru": float(consistency.lru[size]),
        "load_max_over_mean": float((load.max(1) / load.mean(1)).mean()),
    }
