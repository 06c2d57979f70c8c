"""Each kind of mistake in a schedule is caught, and the message says where."""

import dataclasses

import pytest

from moejax.collectives.builders import (
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
    shifted_all_to_all,
    shifted_round_trip,
)
from moejax.collectives.check import check_form, check_schedule, simulate, traffic
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


GATHER, SCATTER, REDUCE, A2A = (
    build(FOUR)
    for build in (ring_all_gather, ring_reduce_scatter, ring_all_reduce, shifted_all_to_all)
)
MISTAKES = {
    "a step is missing": (
        dataclasses.replace(A2A, steps=A2A.steps[:-1]),
        "all_to_all",
        "rank 0 returns chunk [4] and never holds it",
    ),
    "a sum is incomplete": (
        dataclasses.replace(SCATTER, steps=SCATTER.steps[:-1]),
        "reduce_scatter",
        "after 2 steps rank 0 lacks the contribution of ranks [1, 2, 3] to chunk 0",
    ),
    "a chunk is not there yet": (
        _edit(GATHER, 1, 2, chunks=(3,)),
        "all_gather",
        "step 1, 2->3, chunk 3: rank 2 does not hold it",
    ),
    "a chunk is not held": (
        _edit(GATHER, 0, 2, chunks=(0,)),
        "all_gather",
        "step 0, 2->3, chunk 0: rank 2 does not hold it",
    ),
    "two messages for one rank": (
        _edit(GATHER, 1, 2, dst=0),
        "all_gather",
        "step 1, rail 0: rank 0 receives two messages",
    ),
    "two messages from one rank": (
        _edit(A2A, 0, 2, src=1),
        "all_to_all",
        "step 0, rail 0: rank 1 sends two messages",
    ),
    "added twice": (
        dataclasses.replace(REDUCE, steps=(*REDUCE.steps[:3], *REDUCE.steps[:1])),
        "all_reduce",
        "step 3, 0->1, chunk 3: the contribution of ranks [0] is added twice",
    ),
    "copied where it should add": (
        _with_step(
            SCATTER,
            0,
            [dataclasses.replace(one, combine="copy") for one in SCATTER.steps[0].transfers],
        ),
        "reduce_scatter",
        "step 0, 0->1, chunk 3: the copy overwrites the contribution of ranks [1]",
    ),
    "nothing to add to": (
        _with_step(
            GATHER,
            0,
            [dataclasses.replace(one, combine="add") for one in GATHER.steps[0].transfers],
        ),
        "all_gather",
        "step 0, 0->1, chunk 0: rank 1 has nothing to add it to",
    ),
    "one of a rail is longer": (
        _edit(A2A, 1, 3, chunks=(13, 14)),
        "all_to_all",
        "step 1, rail 0: 3->1 moves 2 chunks by copy, 0->2 moves 1 by copy",
    ),
    "one of a rail is of another kind": (
        _edit(SCATTER, 1, 3, combine="copy"),
        "reduce_scatter",
        "step 1, rail 0: 3->0 moves 1 chunks by copy, 0->1 moves 1 by add",
    ),
    "an unknown combine": (
        _edit(SCATTER, 0, 0, combine="min"),
        "reduce_scatter",
        "step 0, 0->1: combine='min' is not one of",
    ),
    "a rank that does not exist": (
        _edit(GATHER, 2, 1, dst=4),
        "all_gather",
        "step 2, 1->4: rank 4 is not in 0..3",
    ),
    "a chunk that does not exist": (
        _edit(GATHER, 2, 1, chunks=(9,)),
        "all_gather",
        "step 2, 1->2: chunk 9 is not in 0..3",
    ),
    "a message to oneself": (_edit(GATHER, 0, 1, dst=1), "all_gather", "rank sends to itself"),
    "another layout": (
        dataclasses.replace(SCATTER, end=SCATTER.end[::-1]),
        "reduce_scatter",
        "reduce_scatter: end of rank 0 is (3,), expected (0,)",
    ),
    "another operation": (GATHER, "all_reduce", "start of rank 0 is (0,), expected (0, 1, 2, 3)"),
    "chunks that do not divide": (
        dataclasses.replace(GATHER, num_chunks=6),
        "all_gather",
        "all_gather over 4 ranks wants a multiple of 4 chunks, got 6",
    ),
    "rows missing on one rank": (
        dataclasses.replace(GATHER, start=((0,), (1,), (2,))),
        "all_gather",
        "start names 3 of 4 ranks",
    ),
    "an operation nobody knows": (GATHER, "scan", "operation='scan' is not one of"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_caught(name):
    schedule, operation, message = MISTAKES[name]
    with pytest.raises(InputError) as error:
        check_schedule(schedule, operation)
    assert message in str(error.value)


def test_a_round_trip_must_arrive():
    away = shifted_round_trip(FOUR)
    check_schedule(away, "round_trip")
    with pytest.raises(
        InputError, match=r"rank 0 lacks the contribution of ranks \[1\] to chunk 4"
    ):
        check_schedule(dataclasses.replace(away, steps=()), "round_trip")


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


def test_steps_read_before_they_write():
    """A swap needs no third place."""
    swap = Schedule(
        axes=("expert",),
        sizes=(2,),
        num_chunks=1,
        start=((0,), (0,)),
        end=((0,), (0,)),
        steps=(Step((Transfer(0, 1, (0,), "add"), Transfer(1, 0, (0,), "add"))),),
    )
    check_schedule(swap, "all_reduce")
    assert simulate(swap) == [{0: frozenset({0, 1})}] * 2


def test_traffic_wants_a_size():
    with pytest.raises(InputError, match="chunk_bytes=-1"):
        traffic(GATHER, -1)
