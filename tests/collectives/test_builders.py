import pytest

from moejax.collectives.builders import (
    ring_all_gather,
    shifted_all_to_all,
    shifted_round_trip,
    two_level_all_to_all,
)
from moejax.collectives.check import Traffic, check_schedule, traffic
from moejax.core.errors import InputError
from tests.collectives.cases import CASES, GRIDS, ONE_AXIS, two_rails


@pytest.mark.parametrize("name", ONE_AXIS)
@pytest.mark.parametrize("axes", [*GRIDS, {"expert": 5}, {"data": 3, "expert": 4}], ids=str)
def test_every_builder_is_proven(name, axes):
    case = CASES[name]
    check_schedule(case.build(axes), case.operation)


@pytest.mark.parametrize("outer", [1, 2, 3, 4])
@pytest.mark.parametrize("inner", [1, 2, 4, 5])
def test_two_levels_are_proven_and_cost_what_is_said(outer, inner):
    schedule = two_level_all_to_all({"data": outer, "expert": inner})
    check_schedule(schedule, "all_to_all")
    ranks = outer * inner
    assert traffic(schedule, 1) == {
        "data": Traffic(messages=ranks * (outer - 1), nbytes=ranks * (ranks - inner)),
        "expert": Traffic(messages=ranks * (inner - 1), nbytes=ranks * (inner - 1) * outer),
    }
    flat = traffic(shifted_all_to_all({"data": outer, "expert": inner}), 1)
    assert flat["data"] == Traffic(messages=ranks * (ranks - inner), nbytes=ranks * (ranks - inner))


def test_rings_step_once_per_other_rank():
    assert traffic(ring_all_gather({"expert": 8}), 10) == {
        "expert": Traffic(messages=56, nbytes=560)
    }
    # A row-major ring over two axes crosses the outer one where a row ends.
    crossed = traffic(ring_all_gather({"data": 2, "expert": 4}), 10)
    assert (crossed["data"].messages, crossed["expert"].messages) == (14, 42)


def test_round_trip_and_hand_written_rails_are_proven():
    check_schedule(shifted_round_trip({"data": 2, "expert": 3}), "round_trip")
    check_schedule(two_rails(), "all_gather")


@pytest.mark.parametrize(
    "build, axes, message",
    [
        (two_level_all_to_all, {"expert": 8}, "two levels want two axes, got {'expert': 8}"),
        (two_level_all_to_all, {"a": 2, "b": 2, "c": 2}, "two levels want two axes"),
        (shifted_all_to_all, {}, "at least one axis"),
        (ring_all_gather, {"expert": 0}, "axis expert=0 must be a whole number above 0"),
        (ring_all_gather, {"expert": 4.0}, "axis expert=4.0 must be a whole number"),
    ],
)
def test_what_does_not_fit_is_refused(build, axes, message):
    with pytest.raises(InputError, match=message.replace("{", r"\{")):
        build(axes)
