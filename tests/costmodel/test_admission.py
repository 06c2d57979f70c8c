import doctest

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.costmodel import admission
from moejax.costmodel.admission import (
    average_scores,
    best_swap,
    lanes_without_harm,
    step_budget_bytes,
)


def test_average_converges_to_what_is_used():
    scores = np.zeros(2)
    for _ in range(200):
        scores = average_scores(scores, np.array([1.0, 0.25]), 0.1)
    np.testing.assert_allclose(scores, [1.0, 0.25], rtol=1e-6)
    with pytest.raises(InputError, match="decay=0 must be"):
        average_scores(scores, scores, 0)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_swap_is_the_best_of_all_pairs(seed):
    rng = np.random.default_rng(seed)
    scores, resident = rng.random((3, 5)), rng.random((3, 5)) < 0.5
    resident[0] = False  # a layer without places
    pairs = {
        (layer, i, o): scores[layer, i] - scores[layer, o]
        for layer in range(3)
        for i in range(5)
        for o in range(5)
        if resident[layer, o] and not resident[layer, i]
    }
    swap = best_swap(scores, resident)
    best = max(pairs, key=lambda pair: pairs[pair])
    assert swap is not None and (swap.layer, swap.incoming, swap.outgoing) == best
    assert swap.gain == pytest.approx(pairs[best])
    assert best_swap(scores, resident, margin=swap.gain) is None
    assert best_swap(scores, np.ones_like(resident)) is None


def test_lanes_stop_where_waste_exceeds_the_window():
    # w / tau = 0.26: one lane wastes .08 * .54, each further one as much again.
    hits = np.full(12, 0.92)
    count = lanes_without_harm(hits, 0.46, tau_s=0.69e-3, window_s=0.18e-3)
    assert count == 6
    assert lanes_without_harm(np.full(6, 0.79), 0.46, tau_s=0.69e-3, window_s=0.18e-3) == 2
    assert lanes_without_harm(np.ones(4), 0.0, tau_s=1.0, window_s=1e-9) == 4


def test_budget_is_what_misses_leave():
    assert step_budget_bytes(2.0, 3.0, 5.0) == 7.0 and step_budget_bytes(1.0, 9.0, 5.0) == 0.0
    assert doctest.testmod(admission).failed == 0
