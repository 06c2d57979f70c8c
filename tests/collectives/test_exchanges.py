import pytest

from moejax.collectives.check import check_schedule
from moejax.collectives.exchanges import (
    shifted_all_to_all,
    shifted_round_trip,
    two_level_all_to_all,
)
from moejax.collectives.traffic import Traffic, traffic
from moejax.core.errors import InputError


@pytest.mark.parametrize("outer, inner", [(1, 4), (2, 4), (3, 5), (4, 1)])
def test_two_levels_cost_what_is_said(outer, inner):
    axes = {"data": outer, "expert": inner}
    schedule = two_level_all_to_all(axes)
    ranks = outer * inner
    assert traffic(schedule, 1) == {
        "data": Traffic(messages=ranks * (outer - 1), nbytes=ranks * (ranks - inner)),
        "expert": Traffic(messages=ranks * (inner - 1), nbytes=ranks * (inner - 1) * outer),
    }
    flat = traffic(shifted_all_to_all(axes), 1)
    assert flat["data"] == Traffic(messages=ranks * (ranks - inner), nbytes=ranks * (ranks - inner))


def test_a_round_trip_is_an_all_to_all_and_its_reverse():
    out, both = (build({"expert": 4}) for build in (shifted_all_to_all, shifted_round_trip))
    assert both.steps[:3] == out.steps and len(both.steps) == 6
    check_schedule(both, "round_trip")


@pytest.mark.parametrize("axes", [{"expert": 8}, {"a": 2, "b": 2, "c": 2}])
def test_two_levels_want_two_axes(axes):
    with pytest.raises(InputError, match="two levels want two axes, got {"):
        two_level_all_to_all(axes)
