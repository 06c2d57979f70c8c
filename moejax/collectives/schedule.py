"""A collective as plain data: which rank sends which chunks to whom, step by step.

Following the schedule languages of MSCCL and TACCL, a schedule says nothing about how it runs.
`check` proves what it does, `lower` runs it inside `shard_map`, `cost` prices it, `inspect` finds
it again in a compiled program. All parts are frozen and hashable, so a schedule can be a static
argument, a cache key, or something that one writes by hand and prints.

Ranks are numbered in row-major order over the axes, outermost first. A chunk is the unit that
travels; its id says what it is, not where it lies. Several ranks that start with the same chunk
hold different contributions to it, which `add`, `max` and `xor` combine.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any, Literal, Protocol, get_args

Combine = Literal["copy", "add", "max", "xor"]
COMBINES: tuple[str, ...] = get_args(Combine)
Operation = Literal[
    "reduce_scatter",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "round_trip",
    "broadcast",
    "parity",
]


class Codec(Protocol):
    """A hashable way to shorten messages. It is a projection: coding twice changes nothing more."""

    def encode(self, rows: Any) -> Any:
        """What travels for rows [M, n] of a floating dtype: one array [M, ...]."""
        ...

    def decode(self, wire: Any, n: int, dtype: Any) -> Any:
        """Rows [M, n] again."""
        ...

    def nbytes(self, n: int, itemsize: int) -> int:
        """Bytes that a row of n elements of `itemsize` bytes takes on the wire."""
        ...


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One message: `chunks` of rank `src`, in this order, to rank `dst`.

    What arrives replaces (`copy`) what `dst` holds of these chunks or is combined with it. Within
    one rail of a step a rank sends at most one message and receives at most one. What is sent
    through a codec is from then on, for its sender too, what the codec makes of it; so the same
    bits lie on both ends.
    """

    src: int
    dst: int
    chunks: tuple[int, ...]
    combine: Combine = "copy"
    rail: int = 0
    codec: Codec | None = None

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


def _by_rail(one: Transfer) -> tuple:
    return one.rail, one.src, one.dst, one.chunks, one.combine


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
    native: Operation | None = None  # the compiler's own collective instead of steps

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
        what = f"native {self.native}" if self.native else f"{len(self.steps)} steps"
        head = f"{grid}: {self.num_ranks} ranks, {self.num_chunks} chunks, {what}"
        lines = (f"  {i}: {_describe(step)}" for i, step in enumerate(self.steps))
        return "\n".join([head, *lines])


def _rows(layout: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(chunks) for chunks in layout)


def _describe(step: Step) -> str:
    return ", ".join(
        f"{one.src}->{one.dst} {one.combine} {' '.join(map(str, one.chunks))}"
        + (f" rail {one.rail}" if one.rail else "")
        + (f" by {one.codec}" if one.codec else "")
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
