import pytest

from moejax.collectives.agreement import check_agreement
from moejax.collectives.builders import native, ring_all_gather, ring_all_reduce, xor_parity
from moejax.collectives.check import check_schedule
from moejax.collectives.compose import side_by_side, with_codec, with_combine
from moejax.core.errors import InputError

GRID = {"data": 2, "expert": 2}


def test_side_by_side_keeps_blocks_together():
    one = ring_all_gather({"expert": 3})
    three = side_by_side(one, one, one)
    check_schedule(three, "all_gather")
    check_agreement(three)
    assert three.start[1] == (3, 4, 5) and three.num_chunks == 9
    assert [len(step.rails()) for step in three.steps] == [3, 3]


def test_one_that_ends_early_leaves_its_rail():
    one = ring_all_reduce({"expert": 4})
    merged = side_by_side(one, native({"expert": 4}, "all_reduce"))
    assert [len(step.rails()) for step in merged.steps] == [1] * 6
    with pytest.raises(InputError, match="lacks the contribution"):
        check_schedule(merged, "all_reduce")


def test_codes_on_one_axis():
    schedule = with_codec(ring_all_gather(GRID), "short", "data")
    coded = {(one.src, one.dst) for step in schedule.steps for one in step.transfers if one.codec}
    assert coded == {(1, 2), (3, 0)}
    with pytest.raises(InputError, match="moves 1 chunks by copy coded short"):
        check_schedule(schedule, "all_gather")
    check_schedule(with_codec(ring_all_gather(GRID), "short"), "all_gather")


def test_other_combinations():
    largest = with_combine(ring_all_reduce({"expert": 3}), "max")
    check_schedule(largest, "all_reduce")
    kinds = [{one.combine for one in step.transfers} for step in largest.steps]
    assert kinds == [{"max"}, {"max"}, {"copy"}, {"copy"}]
    assert with_combine(xor_parity({"expert": 3}), "xor") == xor_parity({"expert": 3})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: side_by_side(ring_all_gather({"x": 2}), ring_all_gather({"y": 2})), "in axes"),
        (lambda: side_by_side(ring_all_gather({"x": 2}), ring_all_reduce({"x": 2})), "in start"),
        (lambda: with_codec(ring_all_gather(GRID), "c", "model"), "axis='model' is not one of"),
        (lambda: with_codec(native(GRID, "all_gather"), "c"), "takes no codec"),
        (lambda: with_combine(native(GRID, "all_gather"), "max"), "native collective adds"),
        (lambda: native(GRID, "parity"), "native 'parity' is not one of"),
    ],
)
def test_what_does_not_go_together_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
