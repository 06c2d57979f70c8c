"""Grouped dispatch: exact for balanced choices, counts what a foreign gate does to it."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.dispatch.grouped import check_groups, grouped
from tests.dispatch.cases import E, balanced_routing, check_exact, compiled, layout, routings


def test_balanced_choices_equal_the_reference_and_others_are_counted():
    where = layout(2, 4, axis_type="explicit")
    run = compiled(grouped(num_experts=E, num_groups=4, token_axes=where.token_axes), where)
    idx = balanced_routing(4)
    check_exact(run, idx)
    idx[3] = E  # padding
    check_exact(run, idx)
    foreign = routings()["uniform"]
    lost = np.zeros(foreign.shape, bool)
    for t, row in enumerate(foreign):
        ranks = (row // (E // 4)).tolist()
        lost[t] = [rank in ranks[:k] for k, rank in enumerate(ranks)]
    assert lost.any()
    check_exact(run, foreign, dropped=lost)


def test_wrong_input():
    with pytest.raises(InputError, match="num_experts=16 is not divisible by num_groups=3"):
        grouped(num_experts=E, num_groups=3)
    with pytest.raises(InputError, match="top_k=4 is not divisible by num_groups=8"):
        check_groups(8, 4, 8)
    with pytest.raises(InputError, match="num_groups=4 is not divisible by 8 ranks"):
        check_groups(4, 8, 8)
