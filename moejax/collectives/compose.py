"""Schedules from schedules: side by side on rails, through a codec, with another combination."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from moejax.collectives.layouts import layouts
from moejax.collectives.schedule import (
    Codec,
    Combine,
    Operation,
    Schedule,
    Step,
    Transfer,
    crossed_axis,
)
from moejax.core.errors import check


def num_ranks(axes: Mapping[str, int]) -> int:
    """Ranks of a grid; raises `InputError` for an empty one and for sizes below 1."""
    check(len(axes) > 0, "a schedule wants at least one axis")
    for axis, size in axes.items():
        whole = type(size) is int and size >= 1
        check(whole, f"axis {axis}={size!r} must be a whole number above 0")
    return math.prod(axes.values())


def build(
    axes: Mapping[str, int],
    operation: Operation,
    num_chunks: int,
    steps: Sequence[Step],
    native: Operation | None = None,
) -> Schedule:
    """A schedule with the layouts of `operation`."""
    start, end = layouts(operation, num_ranks(axes), num_chunks)
    return Schedule(
        axes=tuple(axes),
        sizes=tuple(axes.values()),
        num_chunks=num_chunks,
        start=start,
        end=end,
        steps=tuple(steps),
        native=native,
    )


def native(axes: Mapping[str, int], operation: Operation) -> Schedule:
    """The compiler's own collective, with the layouts of the others; R chunks of each operand."""
    known = ("reduce_scatter", "all_gather", "all_reduce", "all_to_all")
    check(operation in known, f"native {operation!r} is not one of {known}")
    ranks = num_ranks(axes)
    num_chunks = ranks * ranks if operation == "all_to_all" else ranks
    return build(axes, operation, num_chunks, (), native=operation)


def every_rank(ranks: int, message: Callable[[int, int], Transfer], index: int) -> Step:
    """The step in which every rank sends `message(index, rank)`."""
    return Step(tuple(message(index, src) for src in range(ranks)))


def side_by_side(*schedules: Schedule) -> Schedule:
    """One schedule of several that do the same over the same ranks, each on rails of its own.

    Chunk c of schedule k of K becomes chunk K * c + k, so blocks stay blocks: every schedule moves
    its part of each block. Steps of the same number run at once.
    """
    first, count = schedules[0], len(schedules)
    for other in schedules[1:]:
        for name in ("axes", "sizes", "num_chunks", "start", "end"):
            mine, theirs = getattr(first, name), getattr(other, name)
            check(mine == theirs, f"schedules side by side differ in {name}: {mine} and {theirs}")

    def moved(one: Transfer, k: int) -> Transfer:
        chunks = tuple(count * chunk + k for chunk in one.chunks)
        return dataclasses.replace(one, chunks=chunks, rail=count * one.rail + k)

    def spread(layout: tuple) -> tuple:
        return tuple(tuple(count * c + k for c in row for k in range(count)) for row in layout)

    empty = Step(())
    together = itertools.zip_longest(*(one.steps for one in schedules), fillvalue=empty)
    return dataclasses.replace(
        first,
        num_chunks=count * first.num_chunks,
        start=spread(first.start),
        end=spread(first.end),
        steps=tuple(
            Step(tuple(moved(one, k) for k, step in enumerate(steps) for one in step.transfers))
            for steps in together
        ),
    )


def with_codec(schedule: Schedule, codec: Codec, axis: str | None = None) -> Schedule:
    """The same schedule with messages coded: all, or those that cross `axis` and nothing slower."""
    check(schedule.native is None, "a native collective takes no codec")
    known = schedule.axes
    check(axis is None or axis in known, f"axis={axis!r} is not one of {known}")

    def coded(one: Transfer) -> Transfer:
        crossed = crossed_axis(one.src, one.dst, schedule.sizes)
        here = axis is None or (crossed is not None and schedule.axes[crossed] == axis)
        return dataclasses.replace(one, codec=codec) if here else one

    return _mapped(schedule, coded)


def with_combine(schedule: Schedule, combine: Combine) -> Schedule:
    """The same schedule with `max` or `xor` where it adds."""
    check(schedule.native is None, "a native collective adds")

    def changed(one: Transfer) -> Transfer:
        return one if one.combine == "copy" else dataclasses.replace(one, combine=combine)

    return _mapped(schedule, changed)


def _mapped(schedule: Schedule, change: Callable[[Transfer], Transfer]) -> Schedule:
    steps = (Step(tuple(change(one) for one in step.transfers)) for step in schedule.steps)
    return dataclasses.replace(schedule, steps=tuple(steps))
