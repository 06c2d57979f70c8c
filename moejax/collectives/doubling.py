"""Partners at distances of powers of two: few steps, for short messages.

Recursive halving and doubling (Rabenseifner 2004; Thakur, Rabenseifner and Gropp 2005). Where R
ranks are no power of two, an all-reduce first folds the ranks past the largest one into the first
of the others, and hands them the result at the end; the other operations refuse.

Letters:
    R  ranks    P  largest power of two up to R
"""

from collections.abc import Mapping

from moejax.collectives.compose import build, every_rank, num_ranks
from moejax.collectives.schedule import Schedule, Step, Transfer
from moejax.core.errors import check


def halving_doubling_all_reduce(axes: Mapping[str, int]) -> Schedule:
    """As few bytes as a ring, 2 (P - 1) of P chunks, in 2 log2 P steps, and two more to fold."""
    ranks, power = _split(axes)
    steps = _folded(ranks, power, _halving(power) + _doubling(power))
    return build(axes, "all_reduce", power, steps)


def recursive_doubling_all_reduce(axes: Mapping[str, int]) -> Schedule:
    """The fewest steps: log2 P of the whole, and two more to fold."""
    ranks, power = _split(axes)

    def message(distance: int, src: int) -> Transfer:
        return Transfer(src, src ^ distance, (0,), "add")

    swaps = [every_rank(power, message, distance) for distance in _distances(power)]
    return build(axes, "all_reduce", 1, _folded(ranks, power, swaps, num_chunks=1))


def halving_reduce_scatter(axes: Mapping[str, int]) -> Schedule:
    """`ring_reduce_scatter` in log2 R steps; R must be a power of two."""
    ranks = _whole_power(axes)
    return build(axes, "reduce_scatter", ranks, _halving(ranks))


def doubling_all_gather(axes: Mapping[str, int]) -> Schedule:
    """`ring_all_gather` in log2 R steps; R must be a power of two."""
    ranks = _whole_power(axes)
    return build(axes, "all_gather", ranks, _doubling(ranks))


def doubling_broadcast(axes: Mapping[str, int]) -> Schedule:
    """The chunk of rank 0 to all, by a binomial tree: ceil(log2 R) steps, any R."""
    ranks = num_ranks(axes)
    steps, informed = [], 1
    while informed < ranks:
        last = min(informed, ranks - informed)
        steps.append(Step(tuple(Transfer(src, src + informed, (0,)) for src in range(last))))
        informed *= 2
    return build(axes, "broadcast", ranks, steps)


def _split(axes: Mapping[str, int]) -> tuple[int, int]:
    ranks = num_ranks(axes)
    return ranks, 1 << (ranks.bit_length() - 1)


def _whole_power(axes: Mapping[str, int]) -> int:
    ranks, power = _split(axes)
    check(ranks == power, f"halving and doubling want a power of two, got {ranks} ranks")
    return ranks


def _distances(power: int) -> list[int]:
    return [1 << i for i in range(power.bit_length() - 1)]


def _halving(power: int) -> list[Step]:
    """A rank sends the half of its chunks that are not on its side of the distance."""

    def message(distance: int, src: int) -> Transfer:
        chunks = tuple(src ^ (distance | near) for near in range(distance))
        return Transfer(src, src ^ distance, chunks, "add")

    return [every_rank(power, message, distance) for distance in reversed(_distances(power))]


def _doubling(power: int) -> list[Step]:
    def message(distance: int, src: int) -> Transfer:
        return Transfer(src, src ^ distance, tuple(src ^ near for near in range(distance)))

    return [every_rank(power, message, distance) for distance in _distances(power)]


def _folded(ranks: int, power: int, steps: list[Step], num_chunks: int = 0) -> list[Step]:
    """The steps of the first P ranks for all R."""
    if ranks == power:
        return steps

    def chunks(partner: int) -> tuple[int, ...]:
        return tuple(partner ^ near if not num_chunks else near for near in range(size))

    size, partners = num_chunks or power, range(ranks - power)
    fold = Step(tuple(Transfer(power + i, i, chunks(i), "add") for i in partners))
    unfold = Step(tuple(Transfer(i, power + i, chunks(i)) for i in partners))
    return [fold, *steps, unfold]
