"""Schedules that no machine could run are refused, and the message says where."""

import dataclasses

import pytest

from moejax.collectives.builders import (
    native,
    ring_all_gather,
    ring_reduce_scatter,
    shifted_all_to_all,
)
from moejax.collectives.form import check_form
from moejax.collectives.schedule import Schedule, Step, Transfer
from moejax.core.errors import InputError
from tests.collectives.cases import two_rails

FOUR = {"expert": 4}


def _edit(schedule: Schedule, step: int, sender: int, **changes) -> Schedule:
    """The schedule with one transfer of one step changed."""
    transfers = tuple(
        dataclasses.replace(one, **changes) if one.src == sender else one
        for one in schedule.steps[step].transfers
    )
    return _with_step(schedule, step, transfers)


def _with_step(schedule: Schedule, step: int, transfers) -> Schedule:
    steps = list(schedule.steps)
    steps[step] = Step(tuple(transfers))
    return dataclasses.replace(schedule, steps=tuple(steps))


GATHER, SCATTER, A2A = (
    build(FOUR) for build in (ring_all_gather, ring_reduce_scatter, shifted_all_to_all)
)
MISTAKES = {
    "two messages for one rank": (
        _edit(GATHER, 1, 2, dst=0),
        "step 1, rail 0: rank 0 receives two messages",
    ),
    "two messages from one rank": (
        _edit(A2A, 0, 2, src=1),
        "step 0, rail 0: rank 1 sends two messages",
    ),
    "one of a rail is longer": (
        _edit(A2A, 1, 3, chunks=(13, 14)),
        "step 1, rail 0: 3->1 moves 2 chunks by copy, 0->2 moves 1 chunks by copy",
    ),
    "one of a rail is of another kind": (
        _edit(SCATTER, 1, 3, combine="copy"),
        "step 1, rail 0: 3->0 moves 1 chunks by copy, 0->1 moves 1 chunks by add",
    ),
    "an unknown combine": (
        _edit(SCATTER, 0, 0, combine="min"),
        "step 0, 0->1: combine='min' is not one of",
    ),
    "a rank that does not exist": (
        _edit(GATHER, 2, 1, dst=4),
        "step 2, 1->4: rank 4 is not in 0..3",
    ),
    "a chunk that does not exist": (
        _edit(GATHER, 2, 1, chunks=(9,)),
        "step 2, 1->2: chunk 9 is not in 0..3",
    ),
    "a message to oneself": (_edit(GATHER, 0, 1, dst=1), "rank sends to itself"),
    "sums and maxima": (
        _with_step(
            SCATTER,
            1,
            [dataclasses.replace(one, combine="max") for one in SCATTER.steps[1].transfers],
        ),
        "step 0 combines by add, step 1 by max",
    ),
    "one of a rail is coded": (
        _edit(GATHER, 1, 2, codec="short"),
        "2->3 moves 1 chunks by copy coded short, 0->1 moves 1 chunks by copy",
    ),
    "steps beside a native collective": (
        dataclasses.replace(native(FOUR, "all_gather"), steps=GATHER.steps),
        "native all_gather with steps of ours",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_caught(name):
    schedule, message = MISTAKES[name]
    with pytest.raises(InputError) as error:
        check_form(schedule)
    assert message in str(error.value)


def test_rails_may_not_land_on_each_other():
    rails = two_rails()
    clash = (
        *rails.steps[0].transfers,
        Transfer(0, 2, (0,), "copy", 2),
        Transfer(1, 3, (2,), "copy", 2),
    )
    check_form(_with_step(rails, 0, clash))
    clash = (*rails.steps[0].transfers, Transfer(2, 1, (0,), "copy", 2))
    with pytest.raises(InputError, match="step 0: rank 1 receives chunk 0 on two rails"):
        check_form(_with_step(rails, 0, clash))
