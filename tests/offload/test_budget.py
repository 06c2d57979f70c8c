"""Budgets are parsed strictly and solved to slots that fit."""

import dataclasses

import pytest

from moejax.core.errors import InputError
from moejax.offload.budget import Footprint, parse_budget, solve_slots

SMALL = Footprint(
    dense_bytes=1000,
    kv_bytes=200,
    workspace_bytes=100,
    expert_bytes=50,
    num_layers=4,
    num_experts=8,
    landing_experts=2,
)


@pytest.mark.parametrize(
    "text, value",
    [
        ("8GiB", 8 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("2gb", 2 * 10**9),
        ("123", 123),
        ("25%", 0.25),
        ("100%", 1.0),
        ("none", None),
        ("None", None),
    ],
)
def test_parse(text, value):
    assert parse_budget(text) == value
    assert type(parse_budget(text)) is type(value)


@pytest.mark.parametrize("text", ["", "eight", "-1GiB", "8GiBs", "0%", "101%", "1e9", "%", "GiB"])
def test_parse_refuses(text):
    with pytest.raises(InputError, match="device budget"):
        parse_budget(text)


def test_bytes_buy_what_is_left_after_the_fixed_part():
    fixed = 1000 + 200 + 100 + 2 * 50
    assert solve_slots(fixed + 10 * 50 + 49, SMALL, min_slots=4) == 10
    assert solve_slots(fixed + 4 * 50, SMALL, min_slots=4) == 4
    assert solve_slots(10**9, SMALL, min_slots=4) == 32


def test_a_learned_predictor_costs_slots():
    fitted = dataclasses.replace(SMALL, predictor_bytes=150)
    assert solve_slots(2000, SMALL, min_slots=4) - solve_slots(2000, fitted, min_slots=4) == 3


def test_a_percentage_means_experts_only():
    assert solve_slots(0.25, SMALL, min_slots=4) == 8 - 2
    assert solve_slots(1.0, SMALL, min_slots=4) == 32 - 2
    assert solve_slots(None, SMALL, min_slots=4) == 32


def test_too_small_a_budget_says_the_minimum():
    with pytest.raises(InputError, match="the minimum is 1600 bytes"):
        solve_slots(1599, SMALL, min_slots=4)
    assert solve_slots(1600, SMALL, min_slots=4) == 4
    with pytest.raises(InputError, match="the minimum is 4 slots, a budget of 18.8%"):
        solve_slots(0.1, SMALL, min_slots=4)
    with pytest.raises(InputError, match="too small"):
        solve_slots(0, SMALL, min_slots=1)
