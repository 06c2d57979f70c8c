"""Proof that all ranks return the same bits, by running a schedule on expressions.

Sums of floating numbers commute to the bit but do not associate. Ranks therefore agree to the bit
when they return the same expression, up to the order of the two operands of each combination. A
codec is a projection: the code of what it made already is the same value.
"""

import dataclasses

from moejax.collectives.check import simulate
from moejax.collectives.schedule import Codec, Schedule, Step
from moejax.core.errors import check


def check_agreement(schedule: Schedule) -> None:
    """Raises `InputError` unless all ranks that return a chunk return the same bits.

    For a schedule that `simulate` accepts. Cost: as of `simulate`.
    """
    simulate(schedule)
    check(schedule.native is None, "of a native collective only its compiler knows the order")
    known = _Expressions()
    state = [
        {chunk: known.number("start", rank, chunk) for chunk in chunks}
        for rank, chunks in enumerate(schedule.start)
    ]
    for step in schedule.steps:
        _evaluate(step, state, known)
    returned: dict[int, tuple[int, int]] = {}
    for rank, chunks in enumerate(schedule.end):
        for chunk in chunks:
            first, value = returned.setdefault(chunk, (rank, state[rank][chunk]))
            check(
                value == state[rank][chunk],
                f"ranks {first} and {rank} return chunk {chunk} combined in different orders",
            )


@dataclasses.dataclass
class _Expressions:
    """Every expression has a number, equal ones the same."""

    numbers: dict[tuple, int] = dataclasses.field(default_factory=dict)
    codecs: dict[int, Codec] = dataclasses.field(default_factory=dict)  # of coded expressions

    def number(self, *expression) -> int:
        return self.numbers.setdefault(expression, len(self.numbers))

    def coded(self, codec: Codec | None, value: int) -> int:
        if codec is None or self.codecs.get(value) == codec:
            return value
        result = self.number("coded", codec, value)
        self.codecs[result] = codec
        return result


def _evaluate(step: Step, state: list[dict[int, int]], known: _Expressions) -> None:
    """One step, in place: first what is sent, and read again by its sender, then what lands."""
    sent = [
        [known.coded(one.codec, state[one.src][chunk]) for chunk in one.chunks]
        for one in step.transfers
    ]
    for one, values in zip(step.transfers, sent, strict=True):
        state[one.src].update(zip(one.chunks, values, strict=True))
    for one, values in zip(step.transfers, sent, strict=True):
        for chunk, value in zip(one.chunks, values, strict=True):
            if one.combine != "copy":
                value = known.number(one.combine, *sorted((value, state[one.dst][chunk])))
            state[one.dst][chunk] = value
