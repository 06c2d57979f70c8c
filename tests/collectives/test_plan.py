import dataclasses

import numpy as np
import pytest

from moejax.collectives.builders import ring_all_gather, ring_all_reduce
from moejax.collectives.compose import with_codec
from moejax.collectives.plan import arrived_chunks, make_plan
from moejax.collectives.schedule import Step, Transfer
from moejax.core.errors import InputError


def test_ranks_of_a_ring_read_the_same_rows():
    plan = make_plan(ring_all_reduce({"expert": 4}))
    assert plan.order[0] == (3, 2, 1, 0) and plan.order[2] == (1, 0, 3, 2)
    for (message,) in plan.steps:
        assert len(set(message.sent)) == 1 and message.width == 1
    # Start rows are 0 to 3; each step adds one value.
    assert [step[0].sent[0] for step in plan.steps] == [(0,), (4,), (5,), (6,), (7,), (8,)]
    assert [step[0].held and step[0].held[0] for step in plan.steps[:4]] == [(1,), (2,), (3,), None]


def test_coded_rows_are_read_again():
    """Between what is sent and what lands: start row 0, again as 1, landed as 2."""
    plan = make_plan(with_codec(ring_all_gather({"expert": 2}), "short"))
    assert plan.steps[0][0].sent == ((0,), (0,)) and plan.result == ((1, 2), (2, 1))


def test_arrived_chunks_marks_ranks_without_a_message():
    schedule = ring_all_gather({"expert": 2})
    cut = dataclasses.replace(schedule, steps=(Step((Transfer(0, 1, (0,)),)),))
    np.testing.assert_array_equal(arrived_chunks(cut)[0], [[-1], [0]])


def test_refused_schedules_have_no_plan():
    schedule = ring_all_gather({"expert": 2})
    with pytest.raises(InputError, match="never holds it"):
        make_plan(dataclasses.replace(schedule, steps=()))
