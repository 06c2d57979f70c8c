"""The schedules that everyone needs: rings, and all-to-all in one or two levels.

All take `axes`, axis names and sizes from the outermost (slowest) inwards, such as
`{"data": 2, "expert": 4}`. Rings are those of Patarasuk and Yuan (2009); the two-level all-to-all
is that of HetuMoE (arXiv 2203.14685) and DeepSpeed-MoE (arXiv 2201.05596).

The order of chunks within a message is relative to its sender. All ranks then do the same thing
with the rows that they hold, and `lower` needs no gather between two steps.

Letters:
    R  ranks    O  ranks along the outer axis    I  ranks along the inner axis
"""

import math
from collections.abc import Callable, Mapping

from moejax.collectives.schedule import Schedule, Step, Transfer
from moejax.core.errors import check

Chunks = tuple[tuple[int, ...], ...]


def ring_reduce_scatter(axes: Mapping[str, int]) -> Schedule:
    """R chunks on every rank to their sums, chunk r on rank r.

    R - 1 steps of one chunk, each to the next rank.
    """
    ranks = _num_ranks(axes)
    return _build(axes, ranks, _all(ranks), _own(ranks), _reducing_steps(ranks))


def ring_all_gather(axes: Mapping[str, int]) -> Schedule:
    """Chunk r of every rank r to all R chunks on every rank. R - 1 steps of one chunk."""
    ranks = _num_ranks(axes)
    return _build(axes, ranks, _own(ranks), _all(ranks), _gathering_steps(ranks))


def ring_all_reduce(axes: Mapping[str, int]) -> Schedule:
    """R chunks on every rank to their sums on every rank: reduce-scatter, then all-gather."""
    ranks = _num_ranks(axes)
    steps = _reducing_steps(ranks) + _gathering_steps(ranks)
    return _build(axes, ranks, _all(ranks), _all(ranks), steps)


def shifted_all_to_all(axes: Mapping[str, int]) -> Schedule:
    """R chunks on every rank, one for each rank, to the R chunks sent to it.

    The chunk from rank a to rank b has the id a * R + b. R - 1 steps: in step s every rank sends
    to the rank s + 1 further on. No step waits for another, so all of them can be in flight.
    """
    ranks = _num_ranks(axes)

    def message(shift: int, src: int) -> Transfer:
        dst = (src + shift) % ranks
        return Transfer(src, dst, (src * ranks + dst,))

    return _build(
        axes,
        ranks * ranks,
        *_all_to_all_layouts(ranks),
        tuple(_step(ranks, message, shift) for shift in range(1, ranks)),
    )


def shifted_round_trip(axes: Mapping[str, int]) -> Schedule:
    """Every chunk to its rank, as by `shifted_all_to_all`, and back: 2 * (R - 1) steps.

    Step s goes out, step s + R - 1 brings home what it carried. A `transform` of what arrives in
    the first R - 1 steps (experts) thus starts with the first arrival, and its result leaves
    before the last one lands. Chunks that stay at home are the caller's to transform.
    """
    out = shifted_all_to_all(axes)
    back = tuple(
        Step(tuple(Transfer(one.dst, one.src, one.chunks) for one in step.transfers))
        for step in out.steps
    )
    return _build(axes, out.num_chunks, out.start, out.start, out.steps + back)


def two_level_all_to_all(axes: Mapping[str, int]) -> Schedule:
    """The same as `shifted_all_to_all`, over exactly two axes, with fewer and longer messages.

    First, along the inner axis, I - 1 steps of O chunks bring everything to the inner coordinate
    where it is wanted; then, along the outer axis, O - 1 steps of I chunks bring it home. A rank
    sends O - 1 messages over the outer axis instead of R - I; the bytes there are the same, those
    along the inner axis O times the I - 1 chunks that the one-level schedule moves there.
    """
    check(len(axes) == 2, f"two levels want two axes, got {dict(axes)}")
    ranks = _num_ranks(axes)
    num_outer, num_inner = axes.values()

    def rank(o: int, i: int) -> int:
        return o % num_outer * num_inner + i % num_inner

    def inward(shift: int, src: int) -> Transfer:
        o, i = divmod(src, num_inner)
        wanted = (rank(o + k, i + shift) for k in range(num_outer))
        return Transfer(src, rank(o, i + shift), tuple(src * ranks + dst for dst in wanted))

    def outward(shift: int, src: int) -> Transfer:
        o, i = divmod(src, num_inner)
        dst = rank(o + shift, i)
        brought = (rank(o, i - k) for k in range(num_inner))
        return Transfer(src, dst, tuple(first * ranks + dst for first in brought))

    steps = [_step(ranks, inward, shift) for shift in range(1, num_inner)]
    steps += [_step(ranks, outward, shift) for shift in range(1, num_outer)]
    return _build(axes, ranks * ranks, *_all_to_all_layouts(ranks), tuple(steps))


def _reducing_steps(ranks: int) -> tuple[Step, ...]:
    def message(step: int, src: int) -> Transfer:
        return Transfer(src, (src + 1) % ranks, ((src - 1 - step) % ranks,), "add")

    return tuple(_step(ranks, message, step) for step in range(ranks - 1))


def _gathering_steps(ranks: int) -> tuple[Step, ...]:
    def message(step: int, src: int) -> Transfer:
        return Transfer(src, (src + 1) % ranks, ((src - step) % ranks,))

    return tuple(_step(ranks, message, step) for step in range(ranks - 1))


def _step(ranks: int, message: Callable[[int, int], Transfer], index: int) -> Step:
    return Step(tuple(message(index, src) for src in range(ranks)))


def _all(ranks: int) -> Chunks:
    return (tuple(range(ranks)),) * ranks


def _own(ranks: int) -> Chunks:
    return tuple((rank,) for rank in range(ranks))


def _all_to_all_layouts(ranks: int) -> tuple[Chunks, Chunks]:
    sent = tuple(tuple(src * ranks + dst for dst in range(ranks)) for src in range(ranks))
    return sent, tuple(zip(*sent, strict=True))


def _num_ranks(axes: Mapping[str, int]) -> int:
    check(len(axes) > 0, "a schedule wants at least one axis")
    for axis, size in axes.items():
        check(
            type(size) is int and size >= 1, f"axis {axis}={size!r} must be a whole number above 0"
        )
    return math.prod(axes.values())


def _build(
    axes: Mapping[str, int], num_chunks: int, start: Chunks, end: Chunks, steps: tuple[Step, ...]
) -> Schedule:
    return Schedule(
        axes=tuple(axes),
        sizes=tuple(axes.values()),
        num_chunks=num_chunks,
        start=start,
        end=end,
        steps=steps,
    )
