"""Proof that a schedule does what it should, by running it on sets in plain Python.

A rank's value of a chunk is the set of ranks whose contributions are summed in it. In every
collective here, each chunk that a rank returns must hold the contributions of all ranks that
started with it; the operations differ in their layouts only:

    operation         start of rank r         end of rank r
    reduce_scatter    all chunks              block r of R
    all_gather        block r of R            all chunks
    all_reduce        all chunks              all chunks
    all_to_all        blocks (r, 0..R-1)      blocks (0..R-1, r) of R * R
    round_trip        blocks (r, 0..R-1)      the same, and block (a, b) was on rank b

Blocks are runs of equally many chunks. Cost: the number of chunks sent, times R for sums.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal, get_args

from moejax.collectives.schedule import COMBINES, Schedule, Transfer, crossed_axis
from moejax.core.errors import check

Operation = Literal["reduce_scatter", "all_gather", "all_reduce", "all_to_all", "round_trip"]
State = list[dict[int, frozenset[int]]]  # per rank: chunk to the ranks summed in it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """What crosses a mesh axis, summed over all ranks."""

    messages: int = 0
    nbytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(messages=self.messages + other.messages, nbytes=self.nbytes + other.nbytes)


def check_schedule(schedule: Schedule, operation: Operation) -> None:
    """Raises `InputError`, naming step, rank and chunk, unless the schedule does `operation`."""
    start, end = expected_layouts(schedule, operation)
    for name, wanted, given in (("start", start, schedule.start), ("end", end, schedule.end)):
        check(len(given) == len(wanted), f"{name} names {len(given)} of {len(wanted)} ranks")
        for rank, (want, have) in enumerate(zip(wanted, given, strict=True)):
            check(want == have, f"{operation}: {name} of rank {rank} is {have}, expected {want}")
    state = simulate(schedule)
    givers: dict[int, set[int]] = {}
    for rank, chunks in enumerate(schedule.start):
        for chunk in chunks:
            givers.setdefault(chunk, set()).add(rank)
    places = [schedule.end]
    if operation == "round_trip":  # a rank keeps what it passes on, so a visit shows at the end
        places.append(expected_layouts(schedule, "all_to_all")[1])
    for rank, chunk in ((r, c) for layout in places for r, row in enumerate(layout) for c in row):
        missing = sorted(givers[chunk] - state[rank].get(chunk, frozenset()))
        check(
            not missing,
            f"{operation}: after {len(schedule.steps)} steps rank {rank} lacks the "
            f"contribution of ranks {missing} to chunk {chunk}",
        )


def expected_layouts(
    schedule: Schedule, operation: Operation
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Start and end layouts of an operation on as many ranks and chunks as the schedule has."""
    check(
        operation in get_args(Operation),
        f"operation={operation!r} is not one of {get_args(Operation)}",
    )
    ranks, num_chunks = schedule.num_ranks, schedule.num_chunks
    blocks = {"all_to_all": ranks * ranks, "round_trip": ranks * ranks, "all_reduce": 1}.get(
        operation, ranks
    )
    check(
        num_chunks >= blocks and num_chunks % blocks == 0,
        f"{operation} over {ranks} ranks wants a multiple of {blocks} chunks, got {num_chunks}",
    )
    size = num_chunks // blocks

    def of_blocks(chosen: Iterable[int]) -> tuple[int, ...]:
        return tuple(chunk for b in chosen for chunk in range(b * size, (b + 1) * size))

    everything = (tuple(range(num_chunks)),) * ranks
    if operation in ("all_to_all", "round_trip"):
        sent = tuple(of_blocks(range(r * ranks, (r + 1) * ranks)) for r in range(ranks))
        if operation == "round_trip":
            return sent, sent
        return sent, tuple(of_blocks(range(r, blocks, ranks)) for r in range(ranks))
    own = tuple(of_blocks([r]) for r in range(ranks))
    return {
        "reduce_scatter": (everything, own),
        "all_gather": (own, everything),
        "all_reduce": (everything, everything),
    }[operation]


def simulate(schedule: Schedule) -> State:
    """What each rank holds after the last step.

    Raises `InputError` when a rank sends what it does not hold, adds a contribution twice, loses
    one, or returns what it does not hold, and whatever `check_form` refuses.
    """
    check_form(schedule)
    state: State = [
        {chunk: frozenset([rank]) for chunk in chunks} for rank, chunks in enumerate(schedule.start)
    ]
    for index, step in enumerate(schedule.steps):
        # A rank may send a chunk and receive the same one: read all, then write.
        arrived = [_arrivals(index, transfer, state) for transfer in step.transfers]
        for transfer, values in zip(step.transfers, arrived, strict=True):
            state[transfer.dst].update(values)
    for rank, chunks in enumerate(schedule.end):
        lacking = sorted(set(chunks) - state[rank].keys())
        check(not lacking, f"rank {rank} returns chunk {lacking[:1]} and never holds it")
    return state


def _arrivals(index: int, transfer: Transfer, before: State) -> dict[int, frozenset[int]]:
    values = {}
    for chunk in transfer.chunks:
        at = f"step {index}, {transfer.src}->{transfer.dst}, chunk {chunk}"
        sent, held = before[transfer.src].get(chunk), before[transfer.dst].get(chunk)
        check(sent is not None, f"{at}: rank {transfer.src} does not hold it")
        assert sent is not None
        if transfer.combine == "copy":
            lost = sorted((held or frozenset()) - sent)
            check(not lost, f"{at}: the copy overwrites the contribution of ranks {lost}")
            values[chunk] = sent
            continue
        check(held is not None, f"{at}: rank {transfer.dst} has nothing to add it to")
        assert held is not None
        twice = sorted(sent & held)
        check(not twice, f"{at}: the contribution of ranks {twice} is added twice")
        values[chunk] = sent | held
    return values


def check_form(schedule: Schedule) -> None:
    """Raises `InputError` unless ranks, chunks and layouts exist and each rail is a permutation."""
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
            _check_chunks(chunks, schedule, f"{name} of rank {rank}")
    for index, step in enumerate(schedule.steps):
        _check_transfers(index, step.transfers, schedule)
        for transfers in step.rails():
            _check_rail(index, transfers)
        landing = [(one.dst, chunk) for one in step.transfers for chunk in one.chunks]
        if len(set(landing)) < len(landing):
            dst, chunk = next(pair for pair in landing if landing.count(pair) > 1)
            check(False, f"step {index}: rank {dst} receives chunk {chunk} on two rails")


def _check_transfers(index: int, transfers: tuple[Transfer, ...], schedule: Schedule) -> None:
    check(len(transfers) > 0, f"step {index} has no transfers")
    for one in transfers:
        at = f"step {index}, {one.src}->{one.dst}"
        for rank in (one.src, one.dst):
            check(
                0 <= rank < schedule.num_ranks,
                f"{at}: rank {rank} is not in 0..{schedule.num_ranks - 1}",
            )
        check(one.src != one.dst, f"{at}: a rank sends to itself")
        check(one.combine in COMBINES, f"{at}: combine={one.combine!r} is not one of {COMBINES}")
        check(len(one.chunks) > 0, f"{at}: a message without chunks")
        _check_chunks(one.chunks, schedule, at)


def _check_chunks(chunks: tuple[int, ...], schedule: Schedule, where: str) -> None:
    for chunk in chunks:
        check(
            0 <= chunk < schedule.num_chunks,
            f"{where}: chunk {chunk} is not in 0..{schedule.num_chunks - 1}",
        )
    check(len(set(chunks)) == len(chunks), f"{where}: chunks {chunks} name one twice")


def _check_rail(index: int, transfers: tuple[Transfer, ...]) -> None:
    """One permutation: every rank runs the same program, so messages are of one kind and length."""
    first, senders, receivers = transfers[0], set(), set()
    for one in transfers:
        at = f"step {index}, rail {one.rail}"
        check(one.src not in senders, f"{at}: rank {one.src} sends two messages")
        check(
            one.dst not in receivers,
            f"{at}: rank {one.dst} receives two messages, the second with chunks {one.chunks}",
        )
        check(
            len(one.chunks) == len(first.chunks) and one.combine == first.combine,
            f"{at}: {one.src}->{one.dst} moves {len(one.chunks)} chunks by {one.combine}, "
            f"{first.src}->{first.dst} moves {len(first.chunks)} by {first.combine}",
        )
        senders.add(one.src)
        receivers.add(one.dst)


def traffic(schedule: Schedule, chunk_bytes: int) -> dict[str, Traffic]:
    """Messages and bytes over each axis, all ranks together.

    A message is charged to the outermost axis that it crosses.
    """
    check(chunk_bytes >= 0, f"chunk_bytes={chunk_bytes} must be at least 0")
    check_form(schedule)
    total = {axis: Traffic() for axis in schedule.axes}
    for step in schedule.steps:
        for one in step.transfers:
            axis = crossed_axis(one.src, one.dst, schedule.sizes)
            assert axis is not None
            total[schedule.axes[axis]] += Traffic(messages=1, nbytes=len(one.chunks) * chunk_bytes)
    return total
