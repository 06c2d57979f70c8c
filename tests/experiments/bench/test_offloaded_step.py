"""The benchmark's arms do the same work, and the cached one moves nothing."""

import jax
import numpy as np
import pytest

from configs.shapes import get_shape
from experiments.bench.offloaded_step import active_bytes, compare, make_engines
from moejax.core.errors import InputError


def test_arms_agree_and_are_summarised():
    engines, granules = make_engines(get_shape("tiny"), capacity=8)
    result = compare(engines, granules, batch=2, rounds=3)
    assert set(result["arms"]) == {"resident", "cached"}
    assert result["overhead"] > 0


def test_an_arm_that_fetches_is_an_error():
    """Half of the cache left empty: the timing would be of something else."""
    engines, granules = make_engines(get_shape("tiny"), capacity=8)
    with pytest.raises(RuntimeError, match="fetches with everything cached"):
        compare(engines, granules[:, ::2], batch=2, rounds=3)


def test_active_bytes_of_one_token_are_the_dense_weights_and_top_k_experts():
    engines, _ = make_engines(get_shape("tiny"), capacity=8)
    cfg, expert = get_shape("tiny"), 3 * 32 * 24 * 4
    dense = sum(np.size(leaf) * 4 for leaf in jax.tree.leaves(engines["resident"].params))
    assert active_bytes(engines["resident"], 1) == pytest.approx(
        dense + cfg.num_moe_layers * cfg.moe.router.top_k * expert
    )


def test_unknown_shape_is_refused():
    with pytest.raises(InputError, match="shape 'huge' is not one of"):
        get_shape("huge")
