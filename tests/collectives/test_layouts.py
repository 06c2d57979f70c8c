import pytest

from moejax.collectives.layouts import layouts
from moejax.core.errors import InputError


def test_blocks_are_runs_of_chunks():
    assert layouts("reduce_scatter", 2, 4) == (((0, 1, 2, 3),) * 2, ((0, 1), (2, 3)))
    assert layouts("all_gather", 2, 2) == (((0,), (1,)), ((0, 1), (0, 1)))
    assert layouts("all_to_all", 2, 4) == (((0, 1), (2, 3)), ((0, 2), (1, 3)))
    assert layouts("round_trip", 2, 4) == (((0, 1), (2, 3)),) * 2
    assert layouts("broadcast", 2, 2) == (((0,), (1,)), ((0,), (0,)))
    assert layouts("parity", 3, 3) == (((1, 2), (0, 2), (0, 1)), ((0,), (1,), (2,)))
    assert layouts("all_reduce", 3, 1) == (((0,),) * 3,) * 2


@pytest.mark.parametrize(
    "operation, ranks, chunks, message",
    [
        ("scan", 2, 2, "operation='scan' is not one of"),
        ("all_gather", 4, 6, "all_gather over 4 ranks wants a multiple of 4 chunks, got 6"),
        ("all_to_all", 2, 2, "wants a multiple of 4 chunks, got 2"),
        ("parity", 1, 1, "parity wants at least 2 ranks, got 1"),
    ],
)
def test_what_makes_no_blocks_is_refused(operation, ranks, chunks, message):
    with pytest.raises(InputError, match=message):
        layouts(operation, ranks, chunks)
