"""Slots that go, step by step, to the layers of which a routing path expects most.

ExpertFlow (arXiv 2410.17954, expert cache) knows before the first layer which experts a step will
take in every layer. It deals the slots to layers in proportion, fetches what is predicted, and
corrects: a missing expert takes the place of the one that the step is least expected to want. With
nothing predicted and slots that stay this is a least-recently-used cache per layer.

Axis letters:
    N  steps      L  MoE layers      E  experts
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from moejax.core.errors import check
from moejax.costmodel.quotas import proportional_quotas
from moejax.simulator.workload import Workload

# Predictions [L, E] of a step -> slots of each layer, int64 [L].
Quotas = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfers:
    """Means per step, in experts."""

    lookups: float
    hits: float
    prefetched: float
    prefetched_in_vain: float

    @property
    def hit_rate(self) -> float:
        return self.hits / self.lookups

    @property
    def moved(self) -> float:
        """Prefetched, or fetched because it was missing."""
        return self.prefetched + self.lookups - self.hits


def fixed(quotas: np.ndarray) -> Quotas:
    """The same slots in every step."""
    return lambda votes: quotas


def dealt(slots: int) -> Quotas:
    """In proportion to the distinct experts predicted, at least one for every layer."""

    def quotas(votes: np.ndarray) -> np.ndarray:
        return proportional_quotas((votes >= 1).sum(1), slots, least=1, most=votes.shape[1])

    return quotas


def follow(work: Workload, votes: np.ndarray, quotas: Quotas) -> Transfers:
    """Runs the steps of `work` through a cache that begins with the past's most used experts.

    Args:
        votes: tokens that each expert is predicted to serve, [N, L, E]; below one: none. All of a
            step are known before its first layer.

    `InputError` for votes of other steps.
    """
    check(
        votes.shape == work.tokens.shape,
        f"votes are {votes.shape}, the steps want {work.tokens.shape}",
    )
    layers, num_experts = work.past.shape
    everyone = np.ones((layers, num_experts), bool)
    resident = _best(everyone, [work.past], quotas(votes[0]))
    last_used = -1 - _rank(everyone, [work.past])  # the most used go last
    lookups = hits = prefetched = in_vain = 0
    for step, (tokens, said) in enumerate(zip(work.tokens, votes, strict=True)):
        slots, wanted = quotas(said), tokens > 0
        held = _best(resident | (said >= 1), [said, last_used], slots)
        arrived = held & ~resident
        hit = held & wanted
        lookups, hits = lookups + int(wanted.sum()), hits + int(hit.sum())
        prefetched += int(arrived.sum())
        in_vain += int((arrived & ~wanted).sum())
        last_used[wanted] = step
        # What is wanted stays or enters, then what was expected, then what was used last.
        resident = _best(held | wanted, [wanted, said, last_used], slots)
    steps = len(work.tokens)
    return Transfers(
        lookups=lookups / steps,
        hits=hits / steps,
        prefetched=prefetched / steps,
        prefetched_in_vain=in_vain / steps,
    )


def _best(among: np.ndarray, keys: list[np.ndarray], slots: np.ndarray) -> np.ndarray:
    """bool [L, E]: of each layer the `slots` (int [L]) first experts of `among` by `_rank`."""
    return among & (_rank(among, keys) < slots[:, None])


def _rank(among: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
    """int [L, E]: places in each layer, those `among` (bool) first, by falling keys in turn."""
    order = np.lexsort([-np.asarray(key, np.float64) for key in reversed([among, *keys])], axis=1)
    return np.argsort(order, axis=1, kind="stable")
