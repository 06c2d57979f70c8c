"""What a schedule moves, and how long that takes: messages, bytes and seconds, before any run.

A message is charged to the outermost axis that it crosses, the slowest link of its way.
"""

import dataclasses
from collections.abc import Mapping

from moejax.collectives.form import check_form
from moejax.collectives.schedule import Schedule, Transfer, crossed_axis
from moejax.core.errors import check
from moejax.costmodel.links import Link


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """What crosses a mesh axis, summed over all ranks."""

    messages: int = 0
    nbytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(messages=self.messages + other.messages, nbytes=self.nbytes + other.nbytes)


def traffic(schedule: Schedule, chunk_bytes: int, itemsize: int = 4) -> dict[str, Traffic]:
    """Messages and bytes over each axis, all ranks together, coded messages as their codec says.

    Args:
        chunk_bytes: of one chunk, uncoded; `itemsize`: of one of its elements.

    A native collective is charged as `inspect` does: as if every rank sent directly to every
    other one, the total of any optimal algorithm; an all-reduce as reduce-scatter and all-gather.
    """
    check(chunk_bytes >= 0, f"chunk_bytes={chunk_bytes} must be at least 0")
    check_form(schedule)
    if schedule.native:
        return _native(schedule, chunk_bytes)
    total = {axis: Traffic() for axis in schedule.axes}
    for step in schedule.steps:
        for one in step.transfers:
            nbytes = message_bytes(one, chunk_bytes, itemsize)
            total[_axis(schedule, one)] += Traffic(messages=1, nbytes=nbytes)
    return total


def message_bytes(one: Transfer, chunk_bytes: int, itemsize: int = 4) -> int:
    """Bytes of a message on the wire."""
    if one.codec is None:
        return len(one.chunks) * chunk_bytes
    check(
        chunk_bytes % itemsize == 0, f"chunk_bytes={chunk_bytes} is no multiple of {itemsize} bytes"
    )
    return len(one.chunks) * one.codec.nbytes(chunk_bytes // itemsize, itemsize)


def _axis(schedule: Schedule, one: Transfer) -> str:
    axis = crossed_axis(one.src, one.dst, schedule.sizes)
    assert axis is not None
    return schedule.axes[axis]


def _native(schedule: Schedule, chunk_bytes: int) -> dict[str, Traffic]:
    ranks = schedule.num_ranks
    rows = max(len(schedule.start[0]), len(schedule.end[0]))
    times = 2 if schedule.native == "all_reduce" else 1
    pairs = {axis: 0 for axis in schedule.axes}
    for src in range(ranks):
        for dst in range(ranks):
            axis = crossed_axis(src, dst, schedule.sizes)
            if axis is not None:
                pairs[schedule.axes[axis]] += 1
    return {
        axis: Traffic(messages=count, nbytes=count * rows * chunk_bytes * times // ranks)
        for axis, count in pairs.items()
    }


def cost(
    schedule: Schedule, chunk_bytes: int, links: Mapping[str, Link], itemsize: int = 4
) -> float:
    """Seconds by the alpha-beta model: each step takes as long as its slowest message.

    A rail of an axis is a link of its own: directions of a torus, or planes of a network. Ranks
    send and receive at once and share nothing. Raises `InputError` for a native schedule, whose
    steps are the compiler's, and where an axis that is crossed has no link.

    >>> from moejax.collectives.builders import ring_all_reduce
    >>> link = Link(alpha_s=1e-6, beta_s_per_byte=1e-9)
    >>> f"{cost(ring_all_reduce({'expert': 4}), 1000, {'expert': link}):.0e}"
    '1e-05'
    """
    check(schedule.native is None, f"native {schedule.native} has no steps to price")
    check_form(schedule)
    seconds = 0.0
    for step in schedule.steps:
        slowest = 0.0
        for transfers in step.rails():  # equally long messages: one per axis is enough
            for one in {_axis(schedule, one): one for one in transfers}.values():
                axis = _axis(schedule, one)
                check(axis in links, f"no link over {axis} among {sorted(links)}")
                nbytes = message_bytes(one, chunk_bytes, itemsize)
                slowest = max(slowest, links[axis].seconds(nbytes))
        seconds += slowest
    return seconds
