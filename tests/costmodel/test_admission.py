import doctest
import itertools

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.costmodel import admission
from moejax.costmodel.admission import (
    average_scores,
    best_lanes,
    best_swap,
    lanes_without_harm,
    prefetch_gain_s,
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


def layer_end_s(hits: tuple[bool, ...], misses: int, tau_s: float, window_s: float) -> float:
    """A link-bound layer, transfer by transfer: prefetches from 0 on, its router at `window_s`."""
    free_s = 0.0
    for _ in hits:
        free_s += tau_s
    free_s = max(free_s, window_s)
    for _ in range(misses - sum(hits)):
        free_s += tau_s
    return free_s


@pytest.mark.parametrize("seed", range(8))
def test_lanes_worth_having_are_the_fastest_of_all_counts(seed):
    """Expected times over every pattern of right and wrong guesses."""
    rng = np.random.default_rng(seed)
    precision, tau_s = np.sort(rng.random(5))[::-1] ** 0.3, rng.uniform(0.5, 2)
    window_s = tau_s * rng.uniform(0, 6)
    seconds = np.zeros(6)
    for count in range(6):
        for hits in itertools.product((True, False), repeat=count):
            chance = np.prod(np.where(hits, precision[:count], 1 - precision[:count]))
            seconds[count] += chance * layer_end_s(hits, 7, tau_s, window_s)
    gain = prefetch_gain_s(precision, tau_s=tau_s, window_s=window_s)
    np.testing.assert_allclose(gain, seconds[0] - seconds, atol=1e-9)
    assert best_lanes(precision, tau_s=tau_s, window_s=window_s) == np.argmin(seconds)
    # The most that the do-no-harm rule lets pass is never less than what is worth having.
    most = lanes_without_harm(precision, 0.0, tau_s=tau_s, window_s=window_s)
    assert most >= np.argmin(seconds) and gain.max() >= 0


def test_precision_is_a_share():
    for wrong in ([0.5, 1.2], [[0.5]]):
        with pytest.raises(InputError, match="is no list of shares"):
            best_lanes(np.array(wrong), tau_s=1.0, window_s=1.0)
    with pytest.raises(InputError, match="tau_s=0.0, window_s=1.0"):
        best_lanes(np.ones(2), tau_s=0.0, window_s=1.0)
    assert best_lanes(np.zeros(0), tau_s=1.0, window_s=1.0) == 0


def test_budget_is_what_misses_leave():
    assert step_budget_bytes(2.0, 3.0, 5.0) == 7.0 and step_budget_bytes(1.0, 9.0, 5.0) == 0.0
    assert doctest.testmod(admission).failed == 0
