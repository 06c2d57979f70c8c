"""The number of steps is chosen where the recall of unseen sequences is best."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.predictors import stopping
from moejax.predictors.config import FitConfig
from tests.predictors import synthetic
from tests.predictors.synthetic import E, V

CFG = FitConfig(horizon_steps=15, batch=64, hidden=8, embedding=8, learning_rate=1e-2)


@pytest.fixture(scope="module")
def chain():
    return synthetic.chained_choices(np.random.default_rng(0), batch=10, length=16)


def test_the_best_of_the_steps_tried(chain):
    got = stopping.choose_steps(chain, E, V, CFG, every=6)
    assert list(got.recall) == [6, 12, 15]
    assert got.recall[got.steps] == max(got.recall.values())
    assert got.recall[15] > got.recall[6] > 0


def test_seconds_are_refused(chain):
    with pytest.raises(InputError, match="in steps, not in seconds"):
        stopping.choose_steps(chain, E, V, FitConfig(horizon_secs=1.0), every=1)
