"""Closed-form shares against a search of all shares."""

import doctest
import itertools

import numpy as np
import pytest

from moejax.collectives import rails as module
from moejax.collectives.rails import best_sixteenths, best_split, hot_from, seconds_of
from moejax.core.errors import InputError
from moejax.costmodel.links import Link


def _random_links(rng, count):
    alphas, rates = 10 ** rng.uniform(-6, -4, count), 10 ** rng.uniform(8, 11, count)
    pairs = zip(alphas.tolist(), rates.tolist(), strict=True)
    return [Link(alpha_s=alpha, beta_s_per_byte=1 / rate) for alpha, rate in pairs]


def _search(links, nbytes):
    """The best time to reach, by bisection: how much can all rails move within it?"""
    low, high = 0.0, min(link.seconds(nbytes) for link in links)
    for _ in range(200):
        time = (low + high) / 2
        moved = sum(max(time - one.alpha_s, 0) / one.beta_s_per_byte for one in links)
        low, high = (low, time) if moved >= nbytes else (time, high)
    return high


def test_doctests():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shares_are_the_best_there_are(count):
    rng = np.random.default_rng(count)
    cold = 0
    for _ in range(100):
        links, nbytes = _random_links(rng, count), float(10 ** rng.uniform(3, 9))
        split = best_split(links, nbytes)
        assert sum(split.shares) == pytest.approx(1) and min(split.shares) >= 0
        assert split.seconds == pytest.approx(_search(links, nbytes), rel=1e-6)
        for link, share, first in zip(links, split.shares, hot_from(links), strict=True):
            assert (share > 0) == (nbytes > first)
            cold += share == 0
            if share:
                assert link.seconds(share * nbytes) == pytest.approx(split.seconds)
    assert (cold > 10) == (count > 1)


@pytest.mark.parametrize("count", [2, 3])
def test_sixteenths_are_the_best_there_are(count):
    rng = np.random.default_rng(0)
    every = [s for s in itertools.product(range(17), repeat=count) if sum(s) == 16]
    for _ in range(20):
        links, nbytes = _random_links(rng, count), float(10 ** rng.uniform(3, 9))
        shares = best_sixteenths(links, nbytes)
        best = min(seconds_of(links, one, nbytes) for one in every)
        assert seconds_of(links, shares, nbytes) == pytest.approx(best, rel=1e-12)


def test_failed_rails_get_nothing():
    one = Link(alpha_s=1e-6, beta_s_per_byte=1e-9)
    assert best_sixteenths([one, None, one], 1e6) == (8, 0, 8)
    with pytest.raises(InputError, match="all 2 rails have failed"):
        best_sixteenths([None, None], 1e6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: best_split([], 1.0), "at least one rail"),
        (lambda: best_split([Link(alpha_s=0.0, beta_s_per_byte=0.0)], 1.0), "rail 0 has beta=0.0"),
        (lambda: best_split([Link(alpha_s=0.0, beta_s_per_byte=1.0)], 0.0), "nbytes=0.0 must be"),
        (lambda: seconds_of([], (), 1.0), "are 0 sixteenths"),
    ],
)
def test_what_cannot_be_split_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
