import doctest

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.costmodel import miss
from moejax.costmodel.hardware import MACHINES, get_machine
from moejax.costmodel.miss import expert_cost, split_columns


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("rows", [1, 64, 4096])
@pytest.mark.parametrize("resident", [0.0, 0.3, 1.0])
def test_no_other_split_is_faster(name, rows, resident):
    cost = expert_cost(get_machine(name), 17e6)
    split = split_columns(cost, rows, resident=resident)
    assert split.alpha + split.beta + split.gamma == pytest.approx(1.0)
    assert 0 <= split.alpha <= resident and min(split.beta, split.gamma) >= 0
    alpha, beta = np.meshgrid(np.linspace(0, resident, 41), np.linspace(0, 1, 401), indexing="ij")
    gamma = 1 - alpha - beta
    device = (alpha + beta) * cost.device_s(rows)
    seconds = np.maximum(np.maximum(beta * cost.fetch_s, device), gamma * cost.host_s(rows))
    best = float(seconds[gamma >= -1e-12].min())
    assert split.seconds <= best * (1 + 1e-12)
    assert split.seconds >= 0.97 * best  # as near as the grid is fine


def test_decode_shares_by_bandwidth_and_prefill_leaves_the_host():
    cost = expert_cost(get_machine("A100-PCIe4"), 17e6)
    machine = cost.machine
    decode, prefill = split_columns(cost, 1), split_columns(cost, 10**6)
    rates = machine.link_rate / (machine.link_rate + machine.host_rate)
    assert decode.beta == pytest.approx(rates) and decode.alpha == 0
    assert prefill.gamma < 0.06


def test_examples_and_wrong_input():
    assert doctest.testmod(miss).failed == 0
    with pytest.raises(InputError, match="wire=2 must be above 0 and at most 1"):
        expert_cost(get_machine("A100-PCIe4"), 17e6, wire=2)
    with pytest.raises(InputError, match="resident=1.5 is not between 0 and 1"):
        split_columns(expert_cost(get_machine("A100-PCIe4"), 17e6), 1, resident=1.5)
