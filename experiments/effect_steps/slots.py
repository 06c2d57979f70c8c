"""Ways to use the slots of a cache when a routing path is predicted, on the same steps.

Axis letters:
    L  MoE layers    N  windows or steps    S  tokens of a window    E  experts
"""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.effect_steps.replay import QWEN3, side_by_side
from moejax.costmodel.quotas import proportional_quotas, solve_quotas, static_hit_curve
from moejax.simulator.demand_slots import Transfers, dealt, fixed, follow
from moejax.simulator.predictions import votes_of_scores
from moejax.simulator.workload import Lanes, Workload, make_workload


def compare(work: Workload, votes: np.ndarray, slots: int) -> dict[str, Transfers]:
    """All ways to use `slots`, on the same steps; votes [N, L, E] are the path's."""
    layers, experts = work.past.shape
    equal = proportional_quotas(np.ones(layers), slots, least=1, most=experts)
    hottest = solve_quotas(static_hit_curve(work.past), slots, least=1)
    breadth = (work.past > 0).sum(1)
    demand = proportional_quotas(breadth, slots, least=1, most=experts)
    silent, truth = np.zeros(votes.shape), work.tokens.astype(float)
    return {
        "lru": follow(work, silent, fixed(equal)),
        "lru_quotas": follow(work, silent, fixed(hottest)),
        "lru_demand": follow(work, silent, fixed(demand)),
        "path": follow(work, votes, fixed(equal)),
        "path_dealt": follow(work, votes, dealt(slots)),
        "true_path": follow(work, truth, fixed(equal)),
        "true_dealt": follow(work, truth, dealt(slots)),
    }


def work_of(
    topk_idx: np.ndarray, scores: np.ndarray, batch: int, *, num_experts: int, seed: int
) -> tuple[Workload, np.ndarray]:
    """Steps of `batch` tokens, their first half the past, and the votes of the second half.

    Choices int32 [L, N, S, K], scores [L, N, S, E].
    """
    steps = min(512, max(128, 2048 // batch))
    chosen = side_by_side(topk_idx, batch, steps, seed)
    lanes = Lanes(
        chosen=chosen,
        num_experts=num_experts,
        expert_bytes=np.full(len(chosen), QWEN3.expert_bytes),
        is_cut=False,
    )
    half = steps // 2
    work = make_workload(
        lanes, slice(0, half), slice(half, steps),
        recall=1.0, seed=seed, dense_bytes=0.0, bits_per_weight=16.0,
    )  # fmt: skip
    said = side_by_side(scores, batch, steps, seed)
    return work, votes_of_scores(said, topk_idx.shape[-1], horizon=0)[half:]


def show(console: Console, figures: dict[str, Any]) -> None:
    """A row for every way, a pair of columns for every share."""
    for batch, shares in figures.items():
        table = Table("", title=f"{batch} tokens a step: hit rate, experts moved (in vain)")
        for share in shares:
            table.add_column(f"{share} in slots", justify="right")
        for name in next(iter(shares.values())):
            cells = [one[name] for one in shares.values()]
            table.add_row(
                name,
                *(
                    f"{c['hit_rate']:.3f}  {c['moved']:5.1f} ({c['prefetched_in_vain']:.1f})"
                    for c in cells
                ),
            )
        console.print(table)
