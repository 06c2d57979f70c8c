"""As many bytes as another predictor has, and no more."""

import jax
import pytest

from experiments.hidden_steps.predict import same_bytes
from moejax.core.errors import InputError
from moejax.core.memory import nbytes
from moejax.predictors.residual import init_residual


def residual(hidden):
    return init_residual(jax.random.key(0), num_layers=4, d_model=6, num_experts=8, hidden=hidden)


def test_the_widest_that_fits():
    for target in (nbytes(residual(1)), 4000, 10000):
        width = same_bytes(target, residual)
        assert nbytes(residual(width)) <= target < nbytes(residual(width + 1))
    assert same_bytes(10**9, residual, most=50) == 50


def test_too_few_bytes():
    with pytest.raises(InputError, match="a predictor of 100 bytes: the smallest has"):
        same_bytes(100, residual)
