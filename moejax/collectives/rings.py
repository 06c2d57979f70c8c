"""Rings: along all ranks, along each axis in turn, in both directions, on a torus.

All take `axes`, axis names and sizes from the outermost (slowest) inwards, such as
`{"data": 2, "expert": 4}`. Rings are those of Patarasuk and Yuan (2009); one along each axis is
the hierarchical all-reduce of Jia et al. (arXiv 1807.11205) and Ying et al.'s on a torus
(arXiv 1811.06992). All send 2 (R - 1) of R chunks, the fewest bytes possible.

Chunks are numbered like ranks, and in a message their order is relative to its sender. All ranks
then do the same thing with the rows that they hold, and `lower` needs no gather between two steps.

Letters:
    R  ranks    I  ranks along the inner axes
"""

import itertools
from collections.abc import Mapping, Sequence

from moejax.collectives.compose import build, every_rank, num_ranks, side_by_side
from moejax.collectives.schedule import Schedule, Step, Transfer


def ring_reduce_scatter(axes: Mapping[str, int]) -> Schedule:
    """R chunks on every rank to their sums, chunk r on rank r.

    R - 1 steps of one chunk, each to the next rank.
    """
    ranks = num_ranks(axes)
    return build(axes, "reduce_scatter", ranks, _scattering((ranks,), [0]))


def ring_all_gather(axes: Mapping[str, int]) -> Schedule:
    """Chunk r of every rank r to all R chunks on every rank. R - 1 steps of one chunk."""
    ranks = num_ranks(axes)
    return build(axes, "all_gather", ranks, _gathering((ranks,), [0]))


def ring_all_reduce(axes: Mapping[str, int], direction: int = 1) -> Schedule:
    """R chunks on every rank to their sums on every rank: reduce-scatter, then all-gather."""
    ranks = num_ranks(axes)
    return build(axes, "all_reduce", ranks, _reducing((ranks,), [0], direction))


def bidirectional_ring_all_reduce(axes: Mapping[str, int]) -> Schedule:
    """Half of each block around the ring one way, half the other: both directions of a link."""
    return side_by_side(ring_all_reduce(axes), ring_all_reduce(axes, -1))


def direct_all_reduce(axes: Mapping[str, int]) -> Schedule:
    """Each chunk straight to the rank that sums it, R - 1 steps, then round a ring to all.

    As many messages and bytes as `ring_all_reduce`, and with a codec every contribution is coded
    once instead of in every partial sum.
    """
    ranks = num_ranks(axes)

    def message(shift: int, src: int) -> Transfer:
        dst = (src + shift) % ranks
        return Transfer(src, dst, (dst,), "add")

    steps = [every_rank(ranks, message, shift) for shift in range(1, ranks)]
    return build(axes, "all_reduce", ranks, [*steps, *_gathering((ranks,), [0])])


def hierarchical_reduce_scatter(axes: Mapping[str, int]) -> Schedule:
    """As `ring_reduce_scatter`, by a ring along each axis, the innermost first.

    What crosses an axis is 1 / I of what it would be without the axes within.
    """
    ranks, sizes = num_ranks(axes), tuple(axes.values())
    return build(axes, "reduce_scatter", ranks, _scattering(sizes, _inner_first(sizes)))


def hierarchical_all_gather(axes: Mapping[str, int]) -> Schedule:
    """As `ring_all_gather`, by a ring along each axis, the outermost first."""
    ranks, sizes = num_ranks(axes), tuple(axes.values())
    return build(axes, "all_gather", ranks, _gathering(sizes, _inner_first(sizes)))


def hierarchical_all_reduce(axes: Mapping[str, int]) -> Schedule:
    """Reduce-scatter along each axis from the innermost out, then all-gather back in.

    Two ranks along the outermost axis swap and add in one step what a ring would send in two.
    """
    sizes = tuple(axes.values())
    ranks, order = num_ranks(axes), _inner_first(sizes)
    if sizes[0] != 2:
        return build(axes, "all_reduce", ranks, _reducing(sizes, order))
    grid, inner = (1, *sizes[1:]), order[:-1]
    stride = ranks // 2

    def swap(index: int, src: int) -> Transfer:
        return Transfer(src, (src + stride) % ranks, (src % stride,), "add")

    steps = _scattering(sizes, inner, grid=grid)
    steps += [every_rank(ranks, swap, 0), *_gathering(sizes, inner, grid=grid)]
    return build(axes, "all_reduce", stride, steps)


def torus_all_reduce(axes: Mapping[str, int]) -> Schedule:
    """The hierarchical all-reduce on as many rails as axes, each starting along another one.

    On a torus of equal sides all its links are busy at once, in one direction.
    """
    sizes = tuple(axes.values())
    ranks, order = num_ranks(axes), _inner_first(sizes)
    rails = (order[k:] + order[:k] for k in range(len(order)))
    return side_by_side(
        *(build(axes, "all_reduce", ranks, _reducing(sizes, rail)) for rail in rails)
    )


def _inner_first(sizes: Sequence[int]) -> list[int]:
    return list(range(len(sizes)))[::-1]


def _reducing(sizes: tuple[int, ...], order: list[int], direction: int = 1) -> list[Step]:
    return _scattering(sizes, order, direction) + _gathering(sizes, order, direction)


def _scattering(
    sizes: tuple[int, ...], order: list[int], direction: int = 1, grid: tuple[int, ...] = ()
) -> list[Step]:
    """Sums along one axis after the other; a rank keeps the chunks of its own coordinate."""
    return [
        _ring_step(sizes, grid or sizes, order[:i], axis, -direction * (1 + s), direction, "add")
        for i, axis in enumerate(order)
        for s in range(sizes[axis] - 1)
    ]


def _gathering(
    sizes: tuple[int, ...], order: list[int], direction: int = 1, grid: tuple[int, ...] = ()
) -> list[Step]:
    return [
        _ring_step(sizes, grid or sizes, order[:i], axis, -direction * s, direction, "copy")
        for i, axis in reversed(list(enumerate(order)))
        for s in range(sizes[axis] - 1)
    ]


def _ring_step(sizes, grid, fixed, axis, offset, direction, combine) -> Step:
    """Every rank sends, to the next one along `axis`, the chunks `offset` away from it there.

    Along `fixed` axes they are those of its own coordinate, along others all of `grid`.
    """
    reach = [range(extent) for extent in grid]
    for one in fixed:
        reach[one] = range(1)
    reach[axis] = range(offset, offset + 1)
    offsets = list(itertools.product(*reach))
    strides = list(itertools.accumulate((*grid[1:], 1)[::-1], lambda a, b: a * b))[::-1]
    ranks = list(itertools.product(*(range(size) for size in sizes)))
    number = {place: rank for rank, place in enumerate(ranks)}

    def message(index: int, src: int) -> Transfer:
        place = ranks[src]
        dst = (*place[:axis], (place[axis] + direction) % sizes[axis], *place[axis + 1 :])
        chunks = tuple(
            sum((p + o) % e * s for p, o, e, s in zip(place, away, grid, strides, strict=True))
            for away in offsets
        )
        return Transfer(src, number[dst], chunks, combine)

    return every_rank(len(ranks), message, 0)
