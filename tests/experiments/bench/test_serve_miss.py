"""Ways to serve a miss agree, and costs follow from their times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.offload_steps import miss_costs
from moejax.core.errors import InputError
from moejax.costmodel.miss import MissCosts


def test_half_moved_and_half_on_the_host_is_the_whole():
    experts = miss_costs.random_experts(2, 4, 8, 12, jnp.float32)
    misses = miss_costs.Misses(experts=experts, top_k=2, rows=3)
    # `host` is the other half of `columns`, and `fetch` what the stage's own tests run.
    arms = {name: miss_costs._arm(misses, name) for name in ("resident", "columns")}
    for _ in range(2):  # the second pass wants other experts
        results = {name: np.asarray(run()) for name, run in arms.items()}
        np.testing.assert_allclose(results["columns"], results["resident"], rtol=2e-5, atol=1e-6)
    assert misses.count == 4 and not jax.tree.leaves(experts)[0].is_deleted()


def test_costs_are_what_is_beyond_resident():
    by_rows = {
        1: dict(resident=1.0, fetch=4.0, host=2.0, columns=3.0),
        32: dict(resident=2.0, fetch=5.0, host=16.0, columns=9.0),
    }
    got = miss_costs.fit_costs(by_rows)
    assert got == MissCosts(fetch_s=3.0, host_read_s=2.0, host_row_s=0.5)


def test_a_machine_too_busy_to_measure_says_so():
    by_rows = {1: dict(resident=4.0, fetch=4.0, host=2.0), 32: dict(host=16.0)}
    with pytest.raises(InputError, match="too busy"):
        miss_costs.fit_costs(by_rows)
