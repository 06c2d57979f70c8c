"""The cache of a simulated step: slots per layer, and who leaves them.

Policies are the functions of `moejax.offload.policies` that the compiled step runs; a victim is
what their `pick_victim` would pick.

Axis letters:
    L  MoE layers      E  experts
"""

import dataclasses

import numpy as np

from moejax.costmodel.admission import Swap, average_scores
from moejax.costmodel.quotas import solve_quotas, static_hit_curve
from moejax.offload.policies import DECAY, POLICIES, Usage
from moejax.simulator.plans import Keep, Plan
from moejax.simulator.workload import Workload


@dataclasses.dataclass(kw_only=True, eq=False)
class Slots:
    """What is resident, and the counters that policies read."""

    keep: Keep
    resident: np.ndarray  # bool [L, E]
    last_used: np.ndarray  # int32 [L, E]
    uses: np.ndarray  # int32 [L, E]
    scores: np.ndarray  # float32 [L, E], moving average of tokens per step
    clock: int = 0


def fill_slots(work: Workload, plan: Plan, slots: int) -> Slots:
    """A cache of the past's most used experts, with `slots` slots over all layers."""
    layers, e = work.past.shape
    quotas = np.zeros(layers, np.int64)
    if plan.keep != "none":
        quotas += slots // layers + (np.arange(layers) < slots % layers)
        if plan.quotas:
            quotas = solve_quotas(static_hit_curve(work.past), slots, least=1)
    rank = np.argsort(np.argsort(-work.past, axis=1, kind="stable"), axis=1, kind="stable")
    share = work.past / np.maximum(1, work.past.sum(1, keepdims=True))
    return Slots(
        keep=plan.keep,
        resident=rank < np.minimum(quotas, e)[:, None],
        last_used=np.full((layers, e), -1, np.int32),
        uses=work.past.astype(np.int32),
        scores=(share * work.tokens[0].sum() / layers).astype(np.float32),
    )


def touch(cache: Slots, layer: int, tokens: np.ndarray) -> None:
    """Counts a call: the experts of `layer` that served `tokens` (int [E]) tokens."""
    used = tokens > 0
    cache.last_used[layer, used] = cache.clock
    cache.uses[layer, used] += 1
    cache.clock += 1
    cache.scores[layer] = average_scores(cache.scores[layer], tokens.astype(np.float32), DECAY)


def insert(cache: Slots, layer: int, arrived: np.ndarray, wanted: np.ndarray) -> None:
    """Lets experts that were moved take the slots of others; never of what the call wants.

    What finds no slot was computed from its landing buffer and is gone.
    """
    if cache.keep in ("none", "static") or len(arrived) == 0:
        return
    leaving = np.flatnonzero(cache.resident[layer] & ~wanted)
    leaving = leaving[np.lexsort([k[leaving] for k in reversed(_key(cache, layer))])]
    pairs = min(len(arrived), len(leaving))
    cache.resident[layer, leaving[:pairs]] = False
    cache.resident[layer, arrived[:pairs]] = True


def swap_in(cache: Slots, swap: Swap) -> None:
    """Ends a swap; nothing happens where demand has changed either place meanwhile."""
    resident = cache.resident[swap.layer]
    if resident[swap.outgoing] and not resident[swap.incoming]:
        resident[swap.outgoing], resident[swap.incoming] = False, True


def _key(cache: Slots, layer: int) -> list[np.ndarray]:
    usage = Usage(
        last_used=cache.last_used[layer],  # pyrefly: ignore[bad-argument-type]
        uses=cache.uses[layer],  # pyrefly: ignore[bad-argument-type]
        average=cache.scores[layer],  # pyrefly: ignore[bad-argument-type]
        clock=np.int32(cache.clock),  # pyrefly: ignore[bad-argument-type]
    )
    assert cache.keep not in ("none", "static"), "nobody leaves"
    return [np.asarray(part) for part in POLICIES[cache.keep](usage)]
