import itertools

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.costmodel.quotas import proportional_quotas, solve_quotas, static_hit_curve


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


@pytest.mark.parametrize("seed", range(6))
def test_shares_follow_demand_as_closely_as_whole_slots_can(seed):
    rng = np.random.default_rng(seed)
    demand, slots = rng.random(4), int(rng.integers(4, 20))
    quotas = proportional_quotas(demand, slots, least=0, most=slots)
    assert quotas.sum() == slots
    share = slots * demand / demand.sum()
    best = min(
        np.abs(share - np.array(division)).sum()
        for division in itertools.product(range(slots + 1), repeat=4)
        if sum(division) == slots
    )
    assert np.abs(share - quotas).sum() == pytest.approx(best)


@pytest.mark.parametrize(
    "demand, slots, want",
    [
        ([100, 0, 0], 3, [1, 1, 1]),
        ([100, 0, 0], 6, [4, 1, 1]),
        ([100, 0, 0], 9, [4, 3, 2]),  # what the first has no use for
        ([0, 0, 0], 7, [3, 2, 2]),
        ([1, 1, 1], 99, [4, 4, 4]),
    ],
)
def test_every_layer_keeps_its_least_and_none_has_more_than_it_can_use(demand, slots, want):
    assert proportional_quotas(np.array(demand), slots, least=1, most=4).tolist() == want


def test_demand_is_not_negative():
    with pytest.raises(InputError, match="has a negative layer"):
        proportional_quotas(np.array([1.0, -1.0]), 4, least=1, most=4)
