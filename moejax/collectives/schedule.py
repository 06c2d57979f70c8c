"""A collective as plain data: which rank sends which chunks to whom, step by step.

Following the schedule languages of MSCCL and TACCL, a schedule says nothing about how it runs.
`check` proves what it does, `lower` runs it inside `shard_map`, `inspect` finds it again in a
compiled program. All parts are frozen and hashable, so a schedule can be a static argument, a
cache key, or something that one writes by hand and prints.

Ranks are numbered in row-major order over the axes, outermost first. A chunk is the unit that
travels; its id says what it is, not where it lies. Several ranks that start with the same chunk
hold different contributions to it, which `add` sums.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Literal, get_args

Combine = Literal["copy", "add"]
COMBINES: tuple[str, ...] = get_args(Combine)


@dataclasses.dataclass(frozen=True, order=True)
class Transfer:
    """One message: `chunks` of rank `src`, in this order, to rank `dst`.

    What arrives replaces (`copy`) or is added to (`add`) what `dst` holds of these chunks. Within
    one rail of a step a rank sends at most one message and receives at most one.
    """

    src: int
    dst: int
    chunks: tuple[int, ...]
    combine: Combine = "copy"
    rail: int = 0

    def __post_init__(self):
        object.__setattr__(self, "chunks", tuple(self.chunks))


@dataclasses.dataclass(frozen=True)
class Step:
    """Transfers that all read what the ranks held before the step; their order means nothing."""

    transfers: tuple[Transfer, ...]

    def __post_init__(self):
        object.__setattr__(self, "transfers", tuple(sorted(self.transfers, key=_by_rail)))

    def rails(self) -> tuple[tuple[Transfer, ...], ...]:
        """The transfers by rail: each is one permutation, and all are in flight at once."""
        groups = itertools.groupby(self.transfers, key=lambda transfer: transfer.rail)
        return tuple(tuple(group) for _, group in groups)


def _by_rail(transfer: Transfer) -> tuple[int, Transfer]:
    return transfer.rail, transfer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A collective over one or more mesh axes. Nothing is judged here: that is what `check` does.

    >>> swap = Schedule(
    ...     axes=("expert",), sizes=(2,), num_chunks=2, start=((0,), (1,)), end=((1,), (0,)),
    ...     steps=(Step((Transfer(0, 1, (0,)), Transfer(1, 0, (1,)))),),
    ... )
    >>> print(swap)
    expert=2: 2 ranks, 2 chunks, 1 steps
      0: 0->1 copy 0, 1->0 copy 1
    """

    axes: tuple[str, ...]  # outermost first
    sizes: tuple[int, ...]  # ranks along each axis
    num_chunks: int
    start: tuple[tuple[int, ...], ...]  # chunks that each rank brings, in the order of its rows
    end: tuple[tuple[int, ...], ...]  # chunks that each rank returns, in the order of its rows
    steps: tuple[Step, ...]

    def __post_init__(self):
        for name in ("axes", "sizes", "steps"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("start", "end"):
            object.__setattr__(self, name, _rows(getattr(self, name)))

    @property
    def num_ranks(self) -> int:
        return math.prod(self.sizes)

    def __str__(self) -> str:
        grid = " ".join(f"{axis}={size}" for axis, size in zip(self.axes, self.sizes, strict=True))
        head = f"{grid}: {self.num_ranks} ranks, {self.num_chunks} chunks, {len(self.steps)} steps"
        lines = (f"  {i}: {_describe(step)}" for i, step in enumerate(self.steps))
        return "\n".join([head, *lines])


def _rows(layout: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(chunks) for chunks in layout)


def _describe(step: Step) -> str:
    return ", ".join(
        f"{one.src}->{one.dst} {one.combine} {' '.join(map(str, one.chunks))}"
        + (f" rail {one.rail}" if one.rail else "")
        for one in step.transfers
    )


def coordinates(rank: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Position of a rank along each axis, outermost first.

    >>> coordinates(5, (2, 4))
    (1, 1)
    """
    place: tuple[int, ...] = ()
    for size in reversed(sizes):
        place = (rank % size, *place)
        rank //= size
    return place


def crossed_axis(src: int, dst: int, sizes: tuple[int, ...]) -> int | None:
    """Index of the outermost axis that a message crosses: the slowest link of its way.

    None when it stays on its rank.

    >>> crossed_axis(0, 1, (2, 4)), crossed_axis(0, 5, (2, 4))
    (1, 0)
    """
    places = zip(coordinates(src, sizes), coordinates(dst, sizes), strict=True)
    return next((axis for axis, (a, b) in enumerate(places) if a != b), None)
