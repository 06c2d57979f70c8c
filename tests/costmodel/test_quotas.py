import itertools

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.costmodel.quotas import solve_quotas, static_hit_curve


@pytest.mark.parametrize("seed", range(8))
def test_no_other_division_gains_more(seed):
    rng = np.random.default_rng(seed)
    gains = np.cumsum(rng.random((3, 5)), axis=1)  # not concave
    slots, least = int(rng.integers(3, 14)), int(rng.integers(0, 2))
    best = max(
        sum(gains[layer, c] for layer, c in enumerate(division))
        for division in itertools.product(range(least, 5), repeat=3)
        if sum(division) <= slots
    )
    quotas = solve_quotas(gains, slots, least=least)
    assert quotas.sum() <= slots and quotas.min() >= least
    assert sum(gains[layer, c] for layer, c in enumerate(quotas)) == pytest.approx(best)


def test_curve_of_a_hot_set():
    curve = static_hit_curve(np.array([[1, 5, 2], [0, 0, 3]]))
    assert curve.tolist() == [[0, 5, 7, 8], [0, 3, 3, 3]]
    assert solve_quotas(curve, 3).tolist() == [2, 1]


def test_too_few_slots_say_the_minimum():
    with pytest.raises(InputError, match="2 slots do not give 3 layers 1 each; the minimum is 3"):
        solve_quotas(np.zeros((3, 5)), 2, least=1)
