"""What a cache keeps, as a rank of experts: recency, frequency, the future.

`hits_by_size` turns a rank into the hit rates of caches of every size. `lru` and `lfu` put what a
token used above everything else, as a cache must that computes from its entries. `sch`
(arXiv 2505.16056) sees `future` tokens ahead and keeps what they use most; `belady` (L. A. Belady,
IBM Systems Journal 5, 1966) sees everything. These two may let go at once of what a token used,
so that `belady` bounds every cache that fetches on demand.

Axis letters:
    B  caches, longest sequence first      b  those that are not at their end
    T  tokens of the longest sequence      K  experts per token      E  experts
"""

import numpy as np

from moejax.simulator.stack import Rank

_TOUCHED = np.int64(1) << 50  # above any count or time


def lru(chosen: np.ndarray, num_experts: int) -> Rank:
    """Keeps the most recently used; of one token's experts, the last slot's."""
    return _Recency(chosen, num_experts).after


def lfu(chosen: np.ndarray, num_experts: int) -> Rank:
    """Keeps the most often used since the start, evicted or not; of equals the most recent."""
    recency = _Recency(chosen, num_experts)
    uses = np.zeros((len(chosen), num_experts + 1), np.int64)

    def rank(t: int, now: np.ndarray) -> np.ndarray:
        _count(uses, now, 1)
        used = recency.after(t, now)
        just_now = np.where(used > t * recency.slots, _TOUCHED, 0)
        return uses[: len(now), :-1] * recency.ticks + used + just_now

    return rank


def belady(chosen: np.ndarray, num_experts: int) -> Rank:
    """Keeps what is used again soonest."""
    caches, tokens, _ = chosen.shape
    next_use = np.empty_like(chosen)  # of every choice, the token that repeats it
    upcoming = np.full((caches, num_experts + 1), tokens, np.int32)
    for t in range(tokens - 1, -1, -1):
        next_use[:, t] = np.take_along_axis(upcoming, chosen[:, t], axis=1)
        np.put_along_axis(upcoming, chosen[:, t], t, axis=1)
    recency = _Recency(chosen, num_experts)

    def rank(t: int, now: np.ndarray) -> np.ndarray:
        np.put_along_axis(upcoming[: len(now)], now, next_use[: len(now), t], axis=1)
        soon = (tokens - upcoming[: len(now), :-1]).astype(np.int64)
        return soon * recency.ticks + recency.after(t, now)

    return rank


def sch(chosen: np.ndarray, num_experts: int, future: int) -> Rank:
    """Keeps what the next `future` tokens use most, of equals the most recent."""
    recency = _Recency(chosen, num_experts)
    ahead = np.zeros((len(chosen), num_experts + 1), np.int64)
    for t in range(1, min(future, chosen.shape[1])):
        _count(ahead, chosen[:, t], 1)

    def rank(t: int, now: np.ndarray) -> np.ndarray:
        if t > 0:
            _count(ahead, now, -1)
        if t + future < chosen.shape[1]:
            _count(ahead, chosen[:, t + future], 1)
        return ahead[: len(now), :-1] * recency.ticks + recency.after(t, now)

    return rank


def _count(counts: np.ndarray, now: np.ndarray, step: int) -> None:
    """Adds `step` for every expert of `now`; no token names one twice."""
    counts[np.arange(len(now))[:, None], now] += step


class _Recency:
    """When every expert was last used, counted in slots: int64 [B, E], 0 for never."""

    def __init__(self, chosen: np.ndarray, num_experts: int):
        self.slots = chosen.shape[2]
        self.ticks = np.int64((chosen.shape[1] + 1) * self.slots)
        self.used = np.zeros((len(chosen), num_experts + 1), np.int64)

    def after(self, t: int, now: np.ndarray) -> np.ndarray:
        order = np.broadcast_to(np.arange(1, self.slots + 1) + t * self.slots, now.shape)
        np.put_along_axis(self.used[: len(now)], now, order, axis=1)
        return self.used[: len(now), :-1]
