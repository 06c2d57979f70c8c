"""Every builder is proven for every number of ranks that it takes; all ranks agree to the bit."""

import pytest

from moejax.collectives.agreement import check_agreement
from moejax.collectives.builders import BUILDERS
from moejax.collectives.check import check_schedule
from tests.collectives.cases import grids

LINES = [{"expert": n} for n in range(1, 17)]
BY_AXIS = [name for name in BUILDERS if name.startswith(("hierarchical", "torus", "two_level"))]
PLANES = [(a, b) for a in range(1, 33) for b in range(1, 65 // a)]
CUBES = [(a, b, c) for a, b in PLANES if a > 1 for c in range(2, 65) if a * b * c <= 64 and b > 1]
MESHES = [dict(zip(("pod", "data", "expert"), sizes, strict=False)) for sizes in PLANES + CUBES]


def _prove(name: str, axes: dict[str, int]) -> int:
    schedule, operation = BUILDERS[name].build(axes), BUILDERS[name].operation
    check_schedule(schedule, operation)
    check_agreement(schedule)
    return schedule.num_ranks


@pytest.mark.parametrize("name", BUILDERS)
def test_every_number_of_ranks(name):
    few = [{"data": 2, "expert": n} for n in range(1, 5)] + [{"data": 3, "expert": 2}]
    lines = grids(name, LINES + few)
    proven = [_prove(name, axes) for axes in lines]
    assert len(proven) >= 5 and max(proven) == max([8, *(a["expert"] for a in lines)])


@pytest.mark.parametrize("name", BY_AXIS)
def test_meshes_of_two_and_three_axes(name):
    """Those of up to 16 ranks, and one of 64."""
    last = {"pod": 4, "data": 4, "expert": 4}
    small = [axes for axes in MESHES if _size(axes) <= 16]
    taken = grids(name, [*small, last if BUILDERS[name].num_axes is None else {"a": 8, "b": 8}])
    assert len(taken) >= 40
    assert _prove(name, taken[-1]) == 64
    for axes in taken[:-1]:
        _prove(name, axes)


@pytest.mark.full
@pytest.mark.parametrize("name", [*BY_AXIS, "shifted_all_to_all"])
def test_every_mesh_up_to_64_ranks(name):
    taken = grids(name, MESHES)
    assert len(taken) >= 200 and max(map(_size, taken)) == 64
    for axes in taken:
        _prove(name, axes)


def _size(axes: dict[str, int]) -> int:
    size = 1
    for extent in axes.values():
        size *= extent
    return size
