"""A schedule with positions for chunks: what a rank reads where, known before anything runs.

Values are rows in the order in which they come to be: start rows first, then, step by step, what a
rank reads again of what it sent through a codec, and what lands. Ranks that do the same with
different chunks read their start rows in the order of their first use; after that the builders'
schedules need no index until the last row.
"""

import dataclasses
import functools
import itertools

import numpy as np

from moejax.collectives.check import simulate
from moejax.collectives.schedule import Codec, Combine, Schedule, Step

Table = tuple[tuple[int, ...], ...]  # per rank, the positions of some rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One rail of one step."""

    pairs: tuple[tuple[int, int], ...]
    sent: Table
    held: Table | None  # what the arriving rows are combined with; None for a copy
    combine: Combine
    codec: Codec | None

    @property
    def width(self) -> int:
        return len(self.sent[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Positions of all that is read; all messages of a step read before any of them lands."""

    order: Table  # start rows by first use
    steps: tuple[tuple[Message, ...], ...]
    result: Table


@functools.lru_cache(maxsize=256)
def make_plan(schedule: Schedule) -> Plan:
    """The plan of a schedule with steps; raises `InputError` when `simulate` does."""
    simulate(schedule)
    position = [{chunk: row for row, chunk in enumerate(chunks)} for chunks in schedule.start]
    num_values = len(schedule.start[0])
    steps = []
    for step in schedule.steps:
        messages, num_values = _plan_step(step, position, num_values)
        steps.append(messages)
    result = [[position[r][chunk] for chunk in chunks] for r, chunks in enumerate(schedule.end)]
    return _renumbered(steps, result, len(schedule.start[0]))


def _plan_step(
    step: Step, position: list[dict[int, int]], num_values: int
) -> tuple[list[tuple], int]:
    """Messages with rows of positions, empty for ranks without any; moves `position` on."""
    rails, ranks = step.rails(), len(position)
    sent = [[[] for _ in range(ranks)] for _ in rails]
    held = [[[] for _ in range(ranks)] for _ in rails]
    for rail, transfers in zip(sent, rails, strict=True):
        for one in transfers:
            rail[one.src] = [position[one.src][chunk] for chunk in one.chunks]
    for transfers in rails:
        if transfers[0].codec:
            for one in transfers:
                position[one.src].update(_numbered(one.chunks, num_values))
            num_values += len(transfers[0].chunks)
    landing = []
    for rail, transfers in zip(held, rails, strict=True):
        for one in transfers:
            if one.combine != "copy":
                rail[one.dst] = [position[one.dst][chunk] for chunk in one.chunks]
            landing.append((one.dst, _numbered(one.chunks, num_values)))
        num_values += len(transfers[0].chunks)
    for dst, places in landing:
        position[dst].update(places)
    return list(zip(rails, sent, held, strict=True)), num_values


def _numbered(chunks: tuple[int, ...], first: int) -> dict[int, int]:
    return {chunk: first + k for k, chunk in enumerate(chunks)}


def _renumbered(steps: list, result: list[list[int]], num_start: int) -> Plan:
    """The plan, each rank's start rows renamed by first use."""
    tables = [table for messages in steps for _, *both in messages for table in both] + [result]
    order = []
    for rank in range(len(result)):
        uses = itertools.chain(*(table[rank] for table in tables), range(num_start))
        order.append(tuple(dict.fromkeys(place for place in uses if place < num_start)))
    renamed = [{row: new for new, row in enumerate(rows)} for rows in order]

    def table(places: list[list[int]]) -> Table:
        rows = [tuple(new.get(p, p) for p in row) for new, row in zip(renamed, places, strict=True)]
        # Ranks without a message do what the first one with a message does: nobody reads it.
        filler = next(row for row in rows if row)
        return tuple(row or filler for row in rows)

    def message(transfers: tuple, sent: list, held: list) -> Message:
        return Message(
            pairs=tuple((one.src, one.dst) for one in transfers),
            sent=table(sent),
            held=table(held) if any(held) else None,
            combine=transfers[0].combine,
            codec=transfers[0].codec,
        )

    return Plan(
        order=tuple(order),
        steps=tuple(tuple(message(*one) for one in messages) for messages in steps),
        result=table(result),
    )


def arrived_chunks(schedule: Schedule) -> tuple[np.ndarray, ...]:
    """Per step, int32 [R, M]: the chunks that each rank's hook sees, -1 where none lands."""
    tables = []
    for step in schedule.steps:
        columns = []
        for transfers in step.rails():
            rail = np.full((schedule.num_ranks, len(transfers[0].chunks)), -1, np.int32)
            for one in transfers:
                rail[one.dst] = one.chunks
            columns.append(rail)
        tables.append(np.concatenate(columns, axis=1))
    return tuple(tables)
