"""Simulated tokens/s with what predictors really said, on the routing that they said it of.

Routing and predictions are those of held-out text on a model that was trained here. Its experts are
far too small for a link, so sizes are those of a layer of a named real model.

Axis letters:
    L  MoE layers    N  windows    S  tokens of a window    B  tokens of a step    E  experts
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.core.errors import check
from moejax.costmodel.admission import best_lanes
from moejax.costmodel.hardware import Machine, get_machine
from moejax.costmodel.miss import expert_cost
from moejax.simulator.plan_search import choose_plan, split_steps
from moejax.simulator.plans import FIXED, Plan, candidate_plans, slots_of_fraction
from moejax.simulator.predictions import precision_by_rank, votes_of_scores, with_votes
from moejax.simulator.step_times import StepTimes, simulate
from moejax.simulator.workload import Lanes, Workload

PERFECT = "perfect"
LRU = FIXED["lru"]
# What a planner may choose without predictions, and what it may besides with them.
BLIND = ("lru", "presched_blind", "columns+lfu")
AHEAD = ("presched", "columns+lfu+prediction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Bytes of one layer of a real model."""

    name: str
    expert_bytes: int
    dense_bytes: int  # attention and router
    kv_bytes: int  # of one position of one sequence


# Its config.json: 2048 wide, experts of 768, 32 heads and 4 of keys and values, 128 each.
QWEN3 = LayerSizes(
    name="Qwen3-30B-A3B, bfloat16",
    expert_bytes=2 * 3 * 2048 * 768,
    dense_bytes=2 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 2048 * 128),
    kv_bytes=2 * 2 * 4 * 128,
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """The steps of one batch size: what tokens chose, and what predictors said that they would."""

    lanes: Lanes
    votes: dict[str, np.ndarray]  # [N, L, E] by predictor
    top_k: int


def side_by_side(values: np.ndarray, batch: int, steps: int, seed: int) -> np.ndarray:
    """[L, steps, B, ...] of [L, N, S, ...]: windows in random order, one lane after another.

    The same order for the same seed. `InputError` where there are too few windows.
    """
    layers, windows, length = values.shape[:3]
    per_lane = -(-steps // length)
    check(
        windows >= batch * per_lane,
        f"{windows} windows of {length} tokens, {steps} steps of batch={batch} want "
        f"{batch * per_lane}",
    )
    order = np.random.default_rng(seed).permutation(windows)[: batch * per_lane]
    rows = values[:, order].reshape(layers, batch, per_lane * length, *values.shape[3:])
    return np.moveaxis(rows[:, :, :steps], 1, 2)


def make_steps(
    topk_idx: np.ndarray,
    scores: Mapping[str, np.ndarray],
    batch: int,
    steps: int,
    *,
    num_experts: int,
    sizes: LayerSizes,
    seed: int,
) -> Steps:
    """Choices int32 [L, N, S, K] and scores [L - 1, N, S, E] by predictor as steps of a batch."""
    top_k = topk_idx.shape[-1]
    votes = {
        name: votes_of_scores(side_by_side(one, batch, steps, seed), top_k)
        for name, one in scores.items()
    }
    lanes = Lanes(
        chosen=side_by_side(topk_idx, batch, steps, seed),
        num_experts=num_experts,
        expert_bytes=np.full(len(topk_idx), sizes.expert_bytes),
        is_cut=False,
    )
    return Steps(lanes=lanes, votes=votes, top_k=top_k)


def replay(
    given: Steps, machine_name: str, *, sizes: LayerSizes, context: int, fraction: float
) -> dict[str, Any]:
    """Figures of one machine and context, by predictor; `fraction` of the experts is resident.

    Lanes and plans are chosen on the second quarter of the steps and scored on the second half.
    """
    machine, lanes = get_machine(machine_name), given.lanes
    layers, steps, batch, _ = lanes.chosen.shape
    dense = sizes.dense_bytes + batch * context * sizes.kv_bytes
    slots = slots_of_fraction(fraction, layers, lanes.num_experts)
    # Drawn with a recall of 1 the predictions are the truth.
    train, test = split_steps(lanes, dense_bytes=dense, bits_per_weight=16.0, recall=1.0, seed=0)
    cost = expert_cost(machine, sizes.expert_bytes)
    window_s = dense / machine.chip.hbm_bytes_per_s + float(cost.device_s(1))
    named = {plan.name: plan for plan in candidate_plans()}
    run = _Run(machine=machine, slots=slots, window_s=window_s, tau_s=cost.fetch_s)
    plain = simulate(test, machine, LRU, slots=slots)
    blind = choose_plan(train, machine, slots=slots, plans=[named[name] for name in BLIND])
    planned = simulate(test, machine, blind, slots=slots)
    half, quarter = steps // 2, steps // 4
    found = {}
    for name, votes in given.votes.items():
        parts = votes[quarter:half], votes[half:]
        found[name] = _one(run, train, test, parts, plain, (blind, planned), named)
    truth = np.asarray(train.tokens, float), np.asarray(test.tokens, float)
    found[PERFECT] = _one(run, train, test, truth, plain, (blind, planned), named)
    return {
        "window_over_tau": window_s / cost.fetch_s,
        "misses_per_layer": float(plain.misses.mean() / layers),
        "none": {"tokens_per_s": batch / float(plain.seconds.mean())},
        "none_planned": {
            "plan": blind.name,
            "tokens_per_s": batch / float(planned.seconds.mean()),
        },
        "predictors": found,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    machine: Machine
    slots: int
    window_s: float
    tau_s: float

    def times(self, work: Workload, plan: Plan) -> StepTimes:
        return simulate(work, self.machine, plan, slots=self.slots)


def _one(
    run: _Run,
    train: Workload,
    test: Workload,
    votes: tuple[np.ndarray, np.ndarray],
    plain: StepTimes,
    blind: tuple[Plan, StepTimes],
    named: Mapping[str, Plan],
) -> dict[str, Any]:
    """A predictor: by the rule of lanes, with every guess moved, and under the planner."""
    before = with_votes(train, votes[0], np.ones(1))
    precision = precision_by_rank(before, LRU, slots=run.slots)
    before = with_votes(train, votes[0], precision)
    after = with_votes(test, votes[1], precision)
    count = best_lanes(precision, tau_s=run.tau_s, window_s=run.window_s)
    every = FIXED["next_gate"]
    ruled = dataclasses.replace(every, name="lru+lanes", lanes=count) if count else LRU
    by_rule = run.times(after, ruled) if count else plain
    all_guesses = run.times(after, every)
    plans = [blind[0], *([ruled] if count else []), *(named[name] for name in AHEAD)]
    chosen = choose_plan(before, run.machine, slots=run.slots, plans=plans)
    planned = blind[1] if chosen == blind[0] else run.times(after, chosen)
    tokens = test.batch * len(test.tokens)

    def figures(times: StepTimes, base: StepTimes) -> dict[str, float]:
        seconds = float(times.seconds.sum())
        return {
            "tokens_per_s": tokens / seconds,
            "gain": float(base.seconds.sum()) / seconds - 1,
            "hit_rate": 1 - float(times.misses.sum() / times.lookups.sum()),
            "wasted_mb_per_token": float(times.wasted_bytes.sum()) / tokens / 1e6,
        }

    return {
        "precision_by_rank": precision[:12].round(4).tolist(),
        "lanes": count,
        "by_rule": figures(by_rule, plain),
        "all_guesses": figures(all_guesses, plain),
        "planned": {"plan": chosen.name, **figures(planned, blind[1])},
    }
