"""Comparison configs that cannot work are refused with their values."""

import pytest

from moejax.core.errors import InputError
from moejax.serving.config import DecodeConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(batch_sizes=(1, 4, 8)), "batch_sizes=(1, 4, 8) and new_tokens=(192, 48) want one"),
        (dict(batch_sizes=(), new_tokens=()), "batch_sizes=() and new_tokens=() want one entry"),
        (dict(batch_sizes=(1, 0)), "batch_sizes=(1, 0) and new_tokens=(192, 48) must be positive"),
        (dict(new_tokens=(-1, 4)), "new_tokens=(-1, 4) must be positive"),
        (dict(batch_sizes=(4, 4)), "batch_sizes=(4, 4) names a size twice"),
        (dict(new_tokens=(1, 48)), "new_tokens=(1, 48) must be at least 2"),
        (dict(device_budget="8Gb/s"), "device budget '8Gb/s' is not like 8GiB, 512MiB, 25% or"),
        (dict(seed=2**32), "seed=4294967296 must be at least 0 and below 2**32"),
        (dict(prompt_bytes=3), "prompt_bytes=3 must be at least 4"),
        (dict(sample_bytes=0), "sample_bytes=0 must be at least 1"),
        (dict(prefetch_lanes=0), "prefetch_lanes=0 must be at least 1"),
        (dict(temperature=0.0), "temperature=0.0 must be positive"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(InputError) as error:
        DecodeConfig(**fields)
    assert message in str(error.value)


def test_one_comparison_is_enough():
    assert DecodeConfig(batch_sizes=(2,), new_tokens=(5,)).batch_sizes == (2,)
