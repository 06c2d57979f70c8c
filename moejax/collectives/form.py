"""Form of a schedule: ranks, chunks and layouts exist, and each rail is one permutation."""

from moejax.collectives.schedule import COMBINES, Schedule, Transfer
from moejax.core.errors import check


def check_form(schedule: Schedule) -> None:
    """Raises `InputError`, naming step, rank and chunk, for what no machine could run."""
    axes, sizes, ranks = schedule.axes, schedule.sizes, schedule.num_ranks
    check(0 < len(axes) == len(sizes), f"axes={axes} and sizes={sizes} do not match")
    check(len(set(axes)) == len(axes), f"axes={axes} names one axis twice")
    check(min(sizes) >= 1, f"sizes={sizes} must be at least 1")
    for name, layout in (("start", schedule.start), ("end", schedule.end)):
        check(len(layout) == ranks, f"{name} names {len(layout)} of {ranks} ranks")
        for rank, chunks in enumerate(layout):
            check(
                len(chunks) == len(layout[0]) > 0,
                f"{name}: rank {rank} has {len(chunks)} chunks, rank 0 has {len(layout[0])}; "
                "all must have equally many, at least 1",
            )
            _check_chunks(chunks, schedule.num_chunks, f"{name} of rank {rank}")
    check(not (schedule.native and schedule.steps), f"native {schedule.native} with steps of ours")
    for index, step in enumerate(schedule.steps):
        check(len(step.transfers) > 0, f"step {index} has no transfers")
        for one in step.transfers:
            _check_transfer(index, one, schedule)
        for transfers in step.rails():
            _check_rail(index, transfers)
        landing = [(one.dst, chunk) for one in step.transfers for chunk in one.chunks]
        if len(set(landing)) < len(landing):
            dst, chunk = next(pair for pair in landing if landing.count(pair) > 1)
            check(False, f"step {index}: rank {dst} receives chunk {chunk} on two rails")
    _check_one_combine(schedule)


def _check_transfer(index: int, one: Transfer, schedule: Schedule) -> None:
    ranks, num_chunks, chunks = schedule.num_ranks, schedule.num_chunks, one.chunks
    wrong = ""
    for rank in (one.src, one.dst):
        if not 0 <= rank < ranks:
            wrong = f"rank {rank} is not in 0..{ranks - 1}"
    if one.src == one.dst:
        wrong = "a rank sends to itself"
    elif one.combine not in COMBINES:
        wrong = f"combine={one.combine!r} is not one of {COMBINES}"
    elif not chunks:
        wrong = "a message without chunks"
    check(not wrong, f"step {index}, {one.src}->{one.dst}: {wrong}")
    _check_chunks(chunks, num_chunks, "step {}, {}->{}", index, one.src, one.dst)


def _check_chunks(chunks: tuple[int, ...], num_chunks: int, where: str, *names: object) -> None:
    if min(chunks) < 0 or max(chunks) >= num_chunks:
        wrong = next(chunk for chunk in chunks if not 0 <= chunk < num_chunks)
        check(False, f"{where.format(*names)}: chunk {wrong} is not in 0..{num_chunks - 1}")
    if len(set(chunks)) != len(chunks):
        check(False, f"{where.format(*names)}: chunks {chunks} name one twice")


def _check_rail(index: int, transfers: tuple[Transfer, ...]) -> None:
    """One permutation: every rank runs the same program, so messages are of one kind and length."""
    first, senders, receivers = transfers[0], set(), set()
    kind = len(first.chunks), first.combine, first.codec
    for one in transfers:
        if one.src in senders or one.dst in receivers:
            who = "sends" if one.src in senders else "receives"
            rank = one.src if one.src in senders else one.dst
            check(
                False,
                f"step {index}, rail {one.rail}: rank {rank} {who} two messages, "
                f"the second with chunks {one.chunks}",
            )
        if (len(one.chunks), one.combine, one.codec) != kind:
            check(
                False,
                f"step {index}, rail {one.rail}: {_kind(one)}, {_kind(first)}",
            )
        senders.add(one.src)
        receivers.add(one.dst)


def _kind(one: Transfer) -> str:
    code = f" coded {one.codec}" if one.codec else ""
    return f"{one.src}->{one.dst} moves {len(one.chunks)} chunks by {one.combine}{code}"


def _check_one_combine(schedule: Schedule) -> None:
    """Sums and maxima of the same values have no common meaning."""
    found: dict[str, int] = {}
    for index, step in enumerate(schedule.steps):
        for one in step.transfers:
            if one.combine != "copy":
                found.setdefault(one.combine, index)
    if len(found) > 1:
        (a, i), (b, j) = list(found.items())[:2]
        check(False, f"step {i} combines by {a}, step {j} by {b}")
