"""One payload over several schedules at once, each moving its sixteenths.

What a rail is: a direction or an axis of a torus, or the path over another mesh axis. JAX chooses
no network card and no protocol; NCCL stripes over cards by itself. Schedules of a split advance
step by step together, tied by a barrier, without which XLA:TPU runs one after the other.

Letters:
    C  chunks that a rank starts with
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.collectives.lower import run_together
from moejax.collectives.rails import PARTS, Shares
from moejax.collectives.schedule import Schedule
from moejax.core.errors import check


@dataclasses.dataclass(frozen=True)
class RailSplit:
    """All-reduce schedules, and the sixteenths that each takes."""

    schedules: tuple[Schedule, ...]
    shares: Shares

    def __post_init__(self):
        object.__setattr__(self, "schedules", tuple(self.schedules))
        object.__setattr__(self, "shares", tuple(self.shares))
        count, shares = len(self.schedules), self.shares
        check(len(shares) == count, f"{len(shares)} shares of {count} schedules")
        whole = min(shares, default=0) >= 0 and sum(shares) == PARTS
        check(whole, f"shares={shares} must be {PARTS} sixteenths, none negative")


def split_all_reduce(split: RailSplit, x: jax.Array) -> jax.Array:
    """Sum over ranks of x [...], part by part on its rail; inside `shard_map`.

    A part is filled up with zeros to a multiple of its schedule's C. Rails without a share compile
    to nothing.
    """
    flat = x.reshape(-1)
    cuts = [flat.size * sum(split.shares[:r]) // PARTS for r in range(len(split.shares) + 1)]
    parts, used = [], []
    for rail, schedule in enumerate(split.schedules):
        if not split.shares[rail]:
            continue
        part, chunks = flat[cuts[rail] : cuts[rail + 1]], len(schedule.start[0])
        parts.append(jnp.pad(part, (0, -part.size % chunks)).reshape(chunks, -1))
        used.append(rail)
    sums = run_together([split.schedules[rail] for rail in used], parts)
    whole = [
        rows.reshape(-1)[: cuts[rail + 1] - cuts[rail]]
        for rows, rail in zip(sums, used, strict=True)
    ]
    return jnp.concatenate(whole).reshape(x.shape)


class Variants:
    """Programs by their shares, each made once.

    `build(shares)` compiles; call `get` with the shares of every single failure beforehand, and a
    dying rail costs no compilation.
    """

    def __init__(self, build: Callable[[Shares], Any]):
        self._build = build
        self._made: dict[Shares, Any] = {}

    def get(self, shares: Shares) -> Any:
        """The program for these shares."""
        if shares not in self._made:
            self._made[shares] = self._build(shares)
        return self._made[shares]

    @property
    def count(self) -> int:
        return len(self._made)
