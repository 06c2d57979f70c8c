"""Proof that a schedule does what it should, by running it on sets in plain Python.

A rank's value of a chunk is the set of ranks whose contributions are combined in it, a bit per
rank. Cost: the number of chunks sent.
"""

from typing import NoReturn

from moejax.collectives.form import check_form
from moejax.collectives.layouts import layouts
from moejax.collectives.schedule import Operation, Schedule, Transfer
from moejax.core.errors import InputError, check

State = list[dict[int, int]]  # per rank: chunk to the ranks combined in it, bit r for rank r


def check_schedule(schedule: Schedule, operation: Operation) -> None:
    """Raises `InputError`, naming step, rank and chunk, unless the schedule does `operation`."""
    start, end = layouts(operation, schedule.num_ranks, schedule.num_chunks)
    check(schedule.native in (None, operation), f"native {schedule.native} does not do {operation}")
    for name, wanted, given in (("start", start, schedule.start), ("end", end, schedule.end)):
        check(len(given) == len(wanted), f"{name} names {len(given)} of {len(wanted)} ranks")
        for rank, (want, have) in enumerate(zip(wanted, given, strict=True)):
            check(want == have, f"{operation}: {name} of rank {rank} is {have}, expected {want}")
    state = simulate(schedule)
    if schedule.native:
        return
    givers = _givers(schedule)
    places = [schedule.end]
    if operation == "round_trip":  # a rank keeps what it passes on, so a visit shows at the end
        places.append(layouts("all_to_all", schedule.num_ranks, schedule.num_chunks)[1])
    for rank, chunk in ((r, c) for layout in places for r, row in enumerate(layout) for c in row):
        lacking = givers[chunk] & ~state[rank].get(chunk, 0)
        if lacking:
            raise InputError(
                f"{operation}: after {len(schedule.steps)} steps rank {rank} lacks the "
                f"contribution of ranks {_ranks(lacking)} to chunk {chunk}"
            )


def _givers(schedule: Schedule) -> dict[int, int]:
    """Chunk to the ranks that start with it."""
    givers: dict[int, int] = {}
    for rank, chunks in enumerate(schedule.start):
        for chunk in chunks:
            givers[chunk] = givers.get(chunk, 0) | 1 << rank
    return givers


def _ranks(bits: int) -> list[int]:
    return [rank for rank in range(bits.bit_length()) if bits >> rank & 1]


def simulate(schedule: Schedule) -> State:
    """What each rank holds after the last step.

    Raises `InputError` when a rank sends what it does not hold, adds a contribution twice, loses
    one, or returns what it does not hold, and whatever `check_form` refuses. A schedule that is
    wrong on the way is refused even where a later copy would repair it.
    """
    check_form(schedule)
    if schedule.native:
        givers = _givers(schedule)
        return [{chunk: givers.get(chunk, 0) for chunk in chunks} for chunks in schedule.end]
    state: State = [{chunk: 1 << rank for chunk in row} for rank, row in enumerate(schedule.start)]
    for index, step in enumerate(schedule.steps):
        # A rank may send a chunk and receive the same one: read all, then write.
        arrived = [_arrivals(index, one, state) for one in step.transfers]
        for one, values in zip(step.transfers, arrived, strict=True):
            state[one.dst].update(values)
    for rank, chunks in enumerate(schedule.end):
        lacking = sorted(set(chunks) - state[rank].keys())
        check(not lacking, f"rank {rank} returns chunk {lacking[:1]} and never holds it")
    return state


def _arrivals(index: int, one: Transfer, before: State) -> dict[int, int]:
    """What `dst` holds of the message's chunks once it has landed."""
    values = {}
    theirs, mine, combine = before[one.src], before[one.dst], one.combine
    for chunk in one.chunks:
        sent, held = theirs.get(chunk), mine.get(chunk)
        if sent is None:
            _refuse(index, one, chunk, f"rank {one.src} does not hold it")
        elif combine == "copy":
            lost = (held or 0) & ~sent
            if lost:
                why = f"the copy overwrites the contribution of ranks {_ranks(lost)}"
                _refuse(index, one, chunk, why)
            values[chunk] = sent
        elif held is None:
            _refuse(index, one, chunk, f"rank {one.dst} has nothing to {combine} it to")
        else:
            if combine != "max" and sent & held:
                why = f"the contribution of ranks {_ranks(sent & held)} is added twice"
                _refuse(index, one, chunk, why)
            values[chunk] = sent | held
    return values


def _refuse(index: int, one: Transfer, chunk: int, why: str) -> NoReturn:
    raise InputError(f"step {index}, {one.src}->{one.dst}, chunk {chunk}: {why}")
