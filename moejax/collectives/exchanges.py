"""All-to-all in one or two levels, as permutes.

The two-level one is that of HetuMoE (arXiv 2203.14685) and DeepSpeed-MoE (arXiv 2201.05596). The
order of chunks within a message is relative to its sender, as in `rings`.

Letters:
    R  ranks    O  ranks along the outer axis    I  ranks along the inner axis
"""

from collections.abc import Mapping

from moejax.collectives.compose import build, every_rank, num_ranks
from moejax.collectives.schedule import Schedule, Step, Transfer
from moejax.core.errors import check


def shifted_all_to_all(axes: Mapping[str, int]) -> Schedule:
    """R chunks on every rank, one for each rank, to the R chunks sent to it.

    The chunk from rank a to rank b has the id a * R + b. R - 1 steps: in step s every rank sends
    to the rank s + 1 further on. No step waits for another, so all of them can be in flight.
    """
    ranks = num_ranks(axes)

    def message(shift: int, src: int) -> Transfer:
        dst = (src + shift) % ranks
        return Transfer(src, dst, (src * ranks + dst,))

    steps = [every_rank(ranks, message, shift) for shift in range(1, ranks)]
    return build(axes, "all_to_all", ranks * ranks, steps)


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
    return build(axes, "round_trip", out.num_chunks, out.steps + back)


def two_level_all_to_all(axes: Mapping[str, int]) -> Schedule:
    """The same as `shifted_all_to_all`, over exactly two axes, with fewer and longer messages.

    First, along the inner axis, I - 1 steps of O chunks bring everything to the inner coordinate
    where it is wanted; then, along the outer axis, O - 1 steps of I chunks bring it home. A rank
    sends O - 1 messages over the outer axis instead of R - I; the bytes there are the same, those
    along the inner axis O times the I - 1 chunks that the one-level schedule moves there.
    """
    check(len(axes) == 2, f"two levels want two axes, got {dict(axes)}")
    ranks = num_ranks(axes)
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

    steps = [every_rank(ranks, inward, shift) for shift in range(1, num_inner)]
    steps += [every_rank(ranks, outward, shift) for shift in range(1, num_outer)]
    return build(axes, "all_to_all", ranks * ranks, steps)
