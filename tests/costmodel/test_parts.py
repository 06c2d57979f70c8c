import doctest

import pytest

from moejax.core.errors import InputError
from moejax.costmodel import parts
from moejax.costmodel.parts import equal_parts_s, landed_s, parts_sent


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("compute", [0.1, 3.0, 9.0])
def test_equal_parts_have_a_closed_form(count, compute):
    events = landed_s([3.0 / count] * count, [compute / count] * count)
    assert equal_parts_s(3.0, compute, count) == pytest.approx(events)
    assert equal_parts_s(3.0, compute, count) >= max(3.0, compute)


def test_a_part_that_began_within_the_window_is_sent():
    assert [parts_sent(window, 3.0, 3) for window in (-1, 0, 0.5, 1, 1.01, 3)] == [0, 0, 1, 1, 2, 3]


def test_examples_and_wrong_input():
    assert doctest.testmod(parts).failed == 0
    with pytest.raises(InputError, match="parts=0 must be at least 1"):
        parts_sent(1.0, 1.0, 0)
