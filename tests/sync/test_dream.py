"""The memoised search against all ways to cut the layers, and extra transfers that cost nothing."""

import doctest
import itertools

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.sync import dream as module
from moejax.sync.dream import fill_in, plan_layers, waiting


def test_doctests():
    assert doctest.testmod(module).failed == 0


def _all_cuts(backward, transfer, period):
    layers = len(backward)
    for ends in itertools.combinations_with_replacement(range(layers + 1), period - 1):
        cuts = (0, *ends, layers)
        yield sum(waiting(backward, transfer, range(*pair)) for pair in itertools.pairwise(cuts))


def test_no_cut_waits_less():
    rng, cut = np.random.default_rng(0), 0
    for _ in range(300):
        layers, period = int(rng.integers(1, 8)), int(rng.integers(1, 5))
        backward = rng.uniform(0.1, 2, layers).tolist()
        transfer = rng.uniform(0.1, 4, layers).tolist()
        plan = plan_layers(backward, transfer, period)
        assert plan.waited_s == pytest.approx(min(_all_cuts(backward, transfer, period)))
        everything = waiting(backward, transfer, range(layers))
        cut += plan.waited_s < everything - 1e-9
        _check_runs_as_planned(plan, backward, transfer, period)
    assert cut > 100


def _check_runs_as_planned(plan, backward, transfer, period):
    """Every layer is sent, and the extra transfers make no step wait longer."""
    assert all(len(set(steps)) == len(steps) >= 1 for steps in plan.when)
    due = [[n for n, steps in enumerate(plan.when) if step in steps] for step in range(period)]
    total = sum(waiting(backward, transfer, layers) for layers in due)
    assert total == pytest.approx(plan.waited_s)


def test_long_periods_are_planned_at_once():
    plan = plan_layers([1.0] * 80, [3.0] * 80, period=32)
    # The last three cannot be hidden, and are sent in steps of their own: 3 + 2 + 1.
    assert plan.waited_s == pytest.approx(6.0)
    assert sum(len(steps) for steps in plan.when) > 80


def test_idle_time_is_filled():
    # The step sends layer 3 after 4 seconds; layers 0 and 1 fit before it, layer 2 does not.
    assert fill_in([1.0] * 5, [1.5, 1.0, 2.0, 1.0, 1.0], [3]) == (0, 1)
    assert fill_in([1.0, 1.0], [1.0, 1.0], []) == (0,)
    assert fill_in([1.0, 1.0], [1.0, 1.0], [0]) == ()


@pytest.mark.parametrize(
    "backward, transfer, period, message",
    [
        ([1.0], [1.0, 1.0], 1, "1 backward times, 2 transfer times"),
        ([], [], 1, "layers=0 and period=1 must be at least 1"),
        ([1.0], [1.0], 0, "layers=1 and period=0 must be at least 1"),
        ([1.0], [-1.0], 1, "must not be negative"),
    ],
)
def test_what_makes_no_plan_is_refused(backward, transfer, period, message):
    with pytest.raises(InputError, match=message):
        plan_layers(backward, transfer, period)
