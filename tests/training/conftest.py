"""The tiny model's weights and forward, compiled once for all tests of training."""

import jax
import pytest

from moejax.models.decoder import forward
from moejax.training.state import init_state
from tests.training.helpers import tiny_model, tiny_train


@pytest.fixture(scope="session")
def params():
    return init_state(tiny_model(), tiny_train()).params


@pytest.fixture(scope="session")
def run_forward():
    """forward(params, tokens [2, 2], model): eight assignments compile fast."""
    return jax.jit(forward, static_argnums=2)
