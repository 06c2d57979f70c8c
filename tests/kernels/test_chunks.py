"""The plan that cuts sorted rows into chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.kernels.chunks import gradient_sizes, max_chunks, pick_sizes, plan_chunks
from tests.kernels.cases import FULL_SIZES, NUM_ROWS, SKEWED, empty_patterns


@pytest.mark.parametrize("sizes", [(1,), (2, 4), (1, 3, 5, 50)])
def test_chunks_tile_the_rows_in_order(sizes):
    run = jax.jit(lambda g: plan_chunks(g, sizes=sizes, num_rows=NUM_ROWS, first_row=7))
    patterns = [*empty_patterns(), *np.asarray(list(SKEWED.values()), np.int32)]
    for group_sizes in patterns:
        plan = jax.device_get(run(group_sizes))
        n = int(plan.num_chunks)
        rows = [
            (group, row)
            for group, start, count in zip(plan.group[:n], plan.row, plan.rows, strict=False)
            for row in range(start, start + count)
        ]
        groups = np.repeat(np.arange(8), group_sizes)
        assert rows == [(group, 7 + row) for row, group in enumerate(groups)]
        np.testing.assert_array_equal(plan.group_of_row[: len(groups)], groups)
        fits = np.asarray(sizes)[plan.size_class[:n]]
        smaller = np.asarray((0, *sizes))[plan.size_class[:n]]
        assert (plan.rows[:n] <= fits).all() and (plan.rows[:n] > smaller).all()
        owner = plan.group[:n]
        for group in range(8):
            first, end = plan.first_chunk[group : group + 2]
            assert (owner[first:end] == group).all() and (owner == group).sum() == end - first


def test_plan_is_long_enough_for_the_worst_case():
    sizes = (2, 4)
    worst = np.asarray([5, 1, 1, 1, 1, 1, 1, 1], np.int32)
    plan = plan_chunks(worst, sizes=sizes, num_rows=12)
    assert plan.num_chunks == 9 <= max_chunks(8, sizes=sizes, num_rows=12) == 11
    assert max_chunks(8, sizes=sizes, num_rows=3) == 3


@pytest.mark.parametrize(
    "num_rows, largest", [(1, 1), (8, 1), (9, 16), (64, 16), (128, 32), (400, 96), (4096, 128)]
)
def test_picked_sizes(num_rows, largest):
    sizes = pick_sizes(num_rows)
    assert list(sizes) == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == largest
    fewer = gradient_sizes(sizes)
    assert set(fewer) <= set(sizes) and fewer[-1] == largest


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="num_rows=0, expected at least 1"):
        pick_sizes(0)
    with pytest.raises(InputError, match=r"sizes=\(4, 2\), expected ascending"):
        plan_chunks(jnp.asarray(FULL_SIZES), sizes=(4, 2), num_rows=NUM_ROWS)
