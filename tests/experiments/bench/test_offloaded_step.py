"""The benchmark's arms do the same work, and the cached one moves nothing."""

import pytest

from configs.shapes import get_shape
from experiments.bench.offloaded_step import compare, make_engines
from moejax.core.errors import InputError


def test_arms_agree_and_are_summarised():
    engines, granules = make_engines(get_shape("tiny"), capacity=8)
    result = compare(engines, granules, batch=2, rounds=3)
    assert set(result["arms"]) == {"resident", "cached"}
    assert result["overhead"] > 0
    # Two sequences that do not begin alike want more than one alone would.
    layers, top_k = get_shape("tiny").num_moe_layers, get_shape("tiny").moe.router.top_k
    assert layers * top_k < result["experts_read"] <= 2 * layers * top_k


def test_an_arm_that_fetches_is_an_error():
    """Half of the cache left empty: the timing would be of something else."""
    engines, granules = make_engines(get_shape("tiny"), capacity=8)
    with pytest.raises(RuntimeError, match="fetches with everything cached"):
        compare(engines, granules[:, ::2], batch=2, rounds=3)


def test_unknown_shape_is_refused():
    with pytest.raises(InputError, match="shape 'huge' is not one of"):
        get_shape("huge")
