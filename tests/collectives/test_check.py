"""Each kind of mistake in a schedule is caught, and the message says where."""

import contextlib
import dataclasses

import numpy as np
import pytest

from moejax.collectives.builders import (
    BUILDERS,
    native,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
    shifted_all_to_all,
    shifted_round_trip,
)
from moejax.collectives.check import check_schedule, simulate
from moejax.collectives.form import check_form
from moejax.collectives.schedule import Schedule, Step, Transfer
from moejax.core.errors import InputError
from tests.collectives.interpreter import interpret, mutate, random_schedule

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
    assert simulate(swap) == [{0: 0b11}] * 2


def test_a_native_collective_does_one_thing():
    ours = native(FOUR, "all_gather")
    check_schedule(ours, "all_gather")
    with pytest.raises(InputError, match="native all_gather does not do all_reduce"):
        check_schedule(ours, "all_reduce")


@pytest.mark.parametrize("name", [n for n, b in BUILDERS.items() if b.operation != "round_trip"])
def test_accepted_is_right_and_rejected_is_wrong(name):
    """One mistake in a builder's schedule, judged by numbers: the proof says the same."""
    builder, rng = BUILDERS[name], np.random.default_rng(1)
    axes = {"data": 2, "expert": 2} if builder.num_axes or builder.power_of_two else {"expert": 5}
    schedule = builder.build(axes)
    # No sum of some of these numbers is the sum of others.
    shape = (schedule.num_ranks, len(schedule.start[0]))
    x = 4 ** np.arange(np.prod(shape)).astype(object).reshape(shape)
    want, judged = interpret(schedule, x), {True: 0, False: 0}
    for _ in range(40):
        spoiled = mutate(rng, schedule)
        with contextlib.suppress(InputError):
            check_form(spoiled)
            right = bool((interpret(spoiled, x) == want).all())
            judged[right] += 1
            try:
                check_schedule(spoiled, builder.operation)
                accepted = True
            except InputError:
                accepted = False
            assert accepted == right, spoiled
    assert judged[False] >= 10


def test_random_schedules_hold_what_the_proof_says():
    rng = np.random.default_rng(2)
    for _ in range(5):
        schedule = random_schedule(rng, "add")
        bits = np.zeros((4, 2), object)
        for rank, chunks in enumerate(schedule.start):
            bits[rank] = [1 << rank for _ in chunks]
        state, got = simulate(schedule), interpret(schedule, bits)
        for rank, chunks in enumerate(schedule.end):
            assert [state[rank][chunk] for chunk in chunks] == got[rank].tolist()
