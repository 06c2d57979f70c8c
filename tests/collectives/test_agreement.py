"""Ranks that add in different orders, or keep what others read coded, are found."""

import pytest

from moejax.collectives.agreement import check_agreement
from moejax.collectives.builders import (
    hierarchical_all_reduce,
    native,
    recursive_doubling_all_reduce,
)
from moejax.collectives.check import check_schedule
from moejax.collectives.compose import build, with_codec
from moejax.collectives.schedule import Step, Transfer
from moejax.core.errors import InputError

FOUR = {"expert": 4}


def _step(*transfers):
    return Step(tuple(Transfer(src, dst, (0,), combine) for src, dst, combine in transfers))


def test_sums_in_different_orders_are_found():
    swap = _step((0, 1, "add"), (1, 0, "add"))
    twice = [_step((2, 0, "add"), (3, 1, "add")), _step((3, 0, "add"), (2, 1, "add"))]
    hand_out = _step((0, 2, "copy"), (1, 3, "copy"))
    schedule = build(FOUR, "all_reduce", 1, [swap, *twice, hand_out])
    check_schedule(schedule, "all_reduce")
    with pytest.raises(InputError, match="ranks 0 and 1 return chunk 0 combined in different ord"):
        check_agreement(schedule)


def test_a_code_that_only_some_read_is_found():
    links = [Transfer(0, 1, (0,)), Transfer(1, 2, (0,), codec="short")]
    schedule = build({"expert": 3}, "broadcast", 3, [Step((one,)) for one in links])
    with pytest.raises(InputError, match="ranks 0 and 1 return chunk 0"):
        check_agreement(schedule)
    everywhere = with_codec(schedule, "short")
    check_agreement(everywhere)


def test_ranks_agree_when_all_read_codes():
    check_agreement(with_codec(recursive_doubling_all_reduce(FOUR), "short"))
    axes = {"data": 3, "expert": 2}
    check_agreement(with_codec(hierarchical_all_reduce(axes), "short", "data"))


def test_a_fold_hands_its_result_out_coded():
    """Rank 4 of 5 gets what rank 0 has, and only those two read the code of it."""
    folded = recursive_doubling_all_reduce({"expert": 5})
    check_agreement(folded)
    with pytest.raises(InputError, match="ranks 0 and 1 return chunk 0"):
        check_agreement(with_codec(folded, "short"))


def test_of_native_ones_nothing_is_known():
    with pytest.raises(InputError, match="only its compiler knows"):
        check_agreement(native(FOUR, "all_reduce"))
