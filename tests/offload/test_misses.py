"""The division inside the compiled step is that of the cost model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.costmodel.hardware import get_machine
from moejax.costmodel.miss import MissCosts, expert_cost
from moejax.costmodel.presched import LayerWork, serve_whole
from moejax.offload.misses import num_moved
from moejax.offload.stage import OffloadConfig

E = 12


def test_divides_as_the_cost_model_does():
    rng = np.random.default_rng(0)
    for fetch_s in (0.1, 0.9, 3.0, 40.0):
        costs = MissCosts(fetch_s=fetch_s, host_read_s=1.0, host_row_s=0.3)
        ours = jax.jit(lambda rows, n, c=costs: num_moved(rows, n, "divide", c))
        for _ in range(8):
            n = int(rng.integers(0, E + 1))
            rows = -np.sort(-rng.integers(1, 20, E))
            host_s = np.maximum(costs.host_read_s, costs.host_row_s * rows[:n])
            want = serve_whole(LayerWork(host_s=host_s, fetch_s=fetch_s)).moved
            assert int(ours(jnp.asarray(rows, jnp.int32), jnp.int32(n))) == want


def test_all_or_none():
    rows, n = jnp.ones((E,), jnp.int32), jnp.int32(5)
    assert int(num_moved(rows, n, "fetch", None)) == 5
    assert int(num_moved(rows, n, "host", None)) == 0


def test_costs_of_a_machine():
    cost = expert_cost(get_machine("A100-PCIe4"), 17e6)
    assert cost.miss.fetch_s == cost.fetch_s
    for rows in (1, 64, 4096):
        assert max(cost.miss.host_read_s, cost.miss.host_row_s * rows) == cost.host_s(rows)


def test_refusals():
    with pytest.raises(InputError, match="host_row_s=0 must be positive"):
        MissCosts(fetch_s=1, host_read_s=1, host_row_s=0)
    with pytest.raises(InputError, match="serve='divide' and costs=None do not go together"):
        OffloadConfig(num_slots=2, serve="divide")
    with pytest.raises(InputError, match="serve='guess' is not one of"):
        OffloadConfig(num_slots=2, serve="guess")
