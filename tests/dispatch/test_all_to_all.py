"""All-to-all with capacities: exact without drops, exact counts and values with them."""

import pytest

from moejax.core.errors import InputError
from moejax.dispatch.all_to_all import all_to_all, slots_per_group
from moejax.dispatch.slots import FITS_ALL, Capacity
from moejax.experts.stage import reference
from tests.dispatch.cases import E, check_exact, compiled, first_come, layout, routings

LAYOUTS = {
    "1x8": lambda: layout(1, 8),
    "2x4": lambda: layout(2, 4),
    "2x4_explicit": lambda: layout(2, 4, axis_type="explicit"),
}


def make(where, **kwargs):
    return all_to_all(num_experts=E, token_axes=where.token_axes, **kwargs)


@pytest.mark.parametrize(
    "name, options",
    [
        ("1x8", {"lowering": "shifted"}),
        ("2x4", {"per": "rank", "inner": reference}),
        ("2x4_explicit", {"inner": reference}),
    ],
)
def test_with_room_for_all_it_equals_the_reference(name, options):
    where = LAYOUTS[name]()
    run = compiled(make(where, capacity=FITS_ALL, **options), where)
    for idx in routings().values():
        check_exact(run, idx)


@pytest.mark.parametrize("per, slots", [("expert", 2), ("rank", 7)])
def test_what_does_not_fit_is_dropped_in_token_order_and_counted(per, slots):
    where = layout(2, 4)
    stage = make(where, capacity=Capacity(slots=slots), per=per, inner=reference)
    run = compiled(stage, where)
    counts = []
    for idx in routings().values():
        group = idx if per == "expert" else idx // (E // where.ranks)
        dropped = first_come(idx, group, slots, ranks=8)
        check_exact(run, idx, dropped=dropped)
        counts.append(dropped.sum())
    assert max(counts) > min(counts) > 0


def test_capacity_in_slots():
    assert slots_per_group(512, 8, 64, 8, Capacity(factor=1.25), "expert") == 80
    assert slots_per_group(512, 8, 64, 8, Capacity(factor=1.25), "rank") == 640
    assert slots_per_group(512, 8, 64, 8, Capacity(slots=9), "rank") == 9
    assert slots_per_group(512, 8, 64, 8, FITS_ALL, "expert") == 512
    assert slots_per_group(512, 8, 16, 8, FITS_ALL, "rank") == 1024
    assert slots_per_group(512, 8, 64, 8, Capacity(factor=99.0), "expert") == 512


def test_wrong_input():
    with pytest.raises(InputError, match="per='node' is neither"):
        all_to_all(num_experts=E, per="node")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(InputError, match="lowering='ring' is not one of"):
        all_to_all(num_experts=E, lowering="ring")  # pyrefly: ignore[bad-argument-type]
    where = layout(1, 8)
    with pytest.raises(InputError, match="num_experts=12 is not divisible by the 8 ranks"):
        run = compiled(all_to_all(num_experts=12, token_axes=where.token_axes), where)
        check_exact(run, routings()["uniform"])
