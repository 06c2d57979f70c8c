"""Shares follow rails that slow down, stay where nothing changed, and leave rails that die."""

import math

import numpy as np
import pytest

from moejax.collectives.controller import ControllerConfig, observe, revive, start
from moejax.collectives.rails import PARTS
from moejax.core.errors import InputError
from moejax.costmodel.links import Link

FAST = Link(alpha_s=1e-5, beta_s_per_byte=1e-10)
SLOW = Link(alpha_s=1e-5, beta_s_per_byte=4e-10)
N = 1e8
CFG = ControllerConfig()


def _seconds(links, shares, noise=1.0):
    return [noise * one.seconds(N * s / PARTS) for one, s in zip(links, shares, strict=True)]


def test_noise_alone_changes_nothing():
    state, rng = start([FAST, SLOW], N), np.random.default_rng(0)
    first = state.shares
    assert first == (13, 3)
    for _ in range(200):
        noise = float(np.exp(rng.normal(0, 0.05)))
        state = observe(state, _seconds([FAST, SLOW], state.shares, noise), N, CFG)
        assert state.shares == first


def test_a_slower_rail_loses_shares_within_steps():
    state, slowed = start([FAST, FAST], N), [SLOW, FAST]
    seen = []
    for _ in range(20):
        state = observe(state, _seconds(slowed, state.shares), N, CFG)
        seen.append(state.shares)
    assert seen[3] == (8, 8) and seen[4] != (8, 8)  # patience
    assert seen[-1] in ((3, 13), (4, 12)) and len(set(seen)) <= 3
    assert seen[14] == seen[-1]


def test_a_dead_rail_gets_nothing_at_once_and_may_come_back():
    state = start([FAST, SLOW, SLOW], N)
    dead = _seconds([FAST, SLOW, SLOW], state.shares)
    dead[0] = math.inf
    state = observe(state, dead, N, CFG)
    assert state.shares == (0, 8, 8) and state.failed == (True, False, False)
    state = observe(state, _seconds([FAST, SLOW, SLOW], state.shares), N, CFG)
    assert state.shares == (0, 8, 8)
    state = revive(state, 0, FAST, N)
    assert state.shares[0] >= 10 and not any(state.failed)


def test_the_last_rail_may_not_die():
    state = start([FAST], N)
    with pytest.raises(InputError, match="all 1 rails have failed"):
        observe(state, [math.inf], N, CFG)
    with pytest.raises(InputError, match="2 times of 1 rails"):
        observe(state, [1.0, 1.0], N, CFG)
    with pytest.raises(InputError, match=r"rail=1 is not in 0..0"):
        revive(state, 1, FAST, N)


@pytest.mark.parametrize("change", [{"memory": 1.0}, {"hysteresis": -0.1}, {"patience": 0}])
def test_settings_that_make_no_sense_are_refused(change):
    with pytest.raises(InputError, match=next(iter(change))):
        ControllerConfig(**change)
