"""A capacity with a fallback: always exact, and it says when it fell back."""

from moejax.dispatch.all_to_all import all_to_all
from moejax.dispatch.dropless import dropless
from moejax.dispatch.gather import gather
from moejax.dispatch.slots import Capacity
from moejax.experts.stage import reference
from tests.dispatch.cases import (
    E,
    balanced_routing,
    check_exact,
    compiled,
    first_come,
    layout,
    routings,
)


def test_it_falls_back_only_when_something_overflows():
    where = layout(1, 8)
    options = {"num_experts": E, "token_axes": where.token_axes, "inner": reference}
    capacity = Capacity(slots=6)
    run = compiled(dropless(all_to_all(**options, capacity=capacity), gather(**options)), where)
    fell_back = []
    for idx in [*routings().values(), balanced_routing(4)]:
        metrics = check_exact(run, idx)
        overflows = first_come(idx, idx, 6, ranks=8).any()
        assert metrics.waves == 1 + overflows
        fell_back.append(bool(overflows))
    assert True in fell_back and False in fell_back
