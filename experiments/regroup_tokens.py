"""Distinct experts that a step wants, before and after ExpertFlow's token scheduler.

    python -m experiments.regroup_tokens --trace=deepseek_v2_lite \\
        --json=results/regroup_deepseek.json

Two batches of sequences are dealt into two groups of the same size by their routing paths
(`moejax/predictors/grouping.py`), and the distinct experts per layer and group are counted:

    before  as the sequences came
    true    regrouped in every step by the path that the step's tokens are about to take: the bound
    past    regrouped in every step by the k most used experts of the sequence so far
    once    regrouped by `past` at a quarter of the sequence and left so

What regrouping costs is a copy of both KV caches (`moejax/serving/regroup.py`).
"""

from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.flag_values import parse_numbers
from experiments.traces import TRACE, open_trace
from moejax.core.errors import InputError, check
from moejax.data.routing_trace import RoutingTrace
from moejax.predictors.coverage import one_hot_sets
from moejax.predictors.grouping import distinct_experts, similarity, two_groups

BATCHES = flags.DEFINE_list(
    "batch_pairs", ["4", "8", "16", "32"], "sequences in each of two batches"
)
TRIALS = flags.DEFINE_integer("trials", 20, "draws of sequences, for every batch")
LENGTH = flags.DEFINE_integer("length", 32, "tokens decoded, of sequences that have as many")
SEED = flags.DEFINE_integer("draw_seed", 0, "of the draws")
DECAY = 0.8  # the better of the history predictor's two averages


def decoded(trace: RoutingTrace, length: int) -> np.ndarray:
    """int32 [L, N, S, K]: the leading `length` tokens of the sequences that have as many."""
    check(length >= 4, f"--length={length} is not at least 4")
    long = np.flatnonzero(trace.sequence_lengths >= length)
    if not len(long):
        raise InputError(
            f"--length={length}: the longest sequence has {trace.sequence_lengths.max()}"
        )
    at = trace.sequence_starts[long][:, None] + np.arange(length)
    return trace.topk_idx[:, at]


def past_paths(chosen: np.ndarray, num_experts: int) -> np.ndarray:
    """int [L, N, S, K]: the experts used most by the earlier tokens of each sequence."""
    top_k = chosen.shape[-1]
    average = np.zeros((*chosen.shape[:2], num_experts), np.float32)
    paths = np.full(chosen.shape, num_experts)
    for position in range(1, chosen.shape[2]):
        hot = one_hot_sets(chosen[:, :, position - 1], num_experts)
        average = DECAY * average + (1 - DECAY) * hot
        paths[:, :, position] = np.argsort(-average, axis=-1, kind="stable")[..., :top_k]
    return paths


def count_steps(chosen: np.ndarray, num_experts: int) -> dict[str, float]:
    """Distinct experts per layer and group, a mean over the steps of chosen [L, 2 B, S, K]."""
    count, length = chosen.shape[1:3]
    past, start = past_paths(chosen, num_experts), length // 4
    stay = two_groups(similarity(past[:, :, start], num_experts))
    sums = dict.fromkeys(("before", "true", "past", "once"), 0.0)
    for position in range(start, length):
        now = chosen[:, :, position]
        orders = {
            "before": np.arange(count),
            "true": two_groups(similarity(now, num_experts)),
            "past": two_groups(similarity(past[:, :, position], num_experts)),
            "once": stay,
        }
        for name, order in orders.items():
            sums[name] += distinct_experts(now, order, num_experts)
    return {name: total / (length - start) for name, total in sums.items()}


def count_batches(trace: RoutingTrace, batches: list[int]) -> dict[str, dict[str, float]]:
    """`count_steps` by batch, a mean over draws of 2 B sequences."""
    chosen = decoded(trace, LENGTH.value)
    have, rng = chosen.shape[1], np.random.default_rng(SEED.value)
    figures = {}
    for batch in batches:
        check(
            2 * batch <= have, f"--batch_pairs={batch}: {have} sequences have {LENGTH.value} tokens"
        )
        draws = [rng.permutation(have)[: 2 * batch] for _ in range(TRIALS.value)]
        trials = [count_steps(chosen[:, draw], trace.num_experts) for draw in draws]
        figures[str(batch)] = {
            name: round(float(np.mean([trial[name] for trial in trials])), 4) for name in trials[0]
        }
    return figures


def main() -> None:
    cli.check_writable(cli.JSON.value)
    batches = parse_numbers("batch_pairs", BATCHES.value)
    check(TRIALS.value >= 1, f"--trials={TRIALS.value} is not at least 1")
    trace, _ = open_trace(TRACE.value)
    console = Console()
    with console.status("regrouping"):
        distinct = count_batches(trace, batches)
    model = trace.meta.get("model", "unknown model")
    figures: dict[str, Any] = {"model": model, "length": LENGTH.value, "trials": TRIALS.value}
    names = list(next(iter(distinct.values())))
    table = Table("batch", *names, title=f"{model}: distinct experts per layer and group")
    for batch, row in distinct.items():
        table.add_row(batch, *(f"{row[name]:.2f}" for name in names))
    console.print(table)
    cli.write_report("regroup_tokens", "simulated", figures | {"distinct_experts": distinct})


if __name__ == "__main__":
    cli.run(main)
