"""Any one rank's pieces come back from the parity of the others."""

import numpy as np
import pytest

from moejax.collectives.parity import xor_parity
from moejax.collectives.traffic import traffic
from moejax.core.errors import InputError
from tests.collectives.interpreter import interpret


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_any_lost_rank_is_rebuilt(ranks):
    schedule = xor_parity({"host": ranks})
    rng = np.random.default_rng(0)
    pieces = rng.integers(0, 256, (ranks, ranks - 1, 7), np.uint8)
    parity = interpret(schedule, pieces)[:, 0]
    for lost in range(ranks):
        for holder in set(range(ranks)) - {lost}:
            rebuilt = parity[holder].copy()
            for other in set(range(ranks)) - {lost, holder}:
                rebuilt ^= pieces[other, schedule.start[other].index(holder)]
            wanted = pieces[lost, schedule.start[lost].index(holder)]
            np.testing.assert_array_equal(rebuilt, wanted)


def test_it_sends_as_much_as_it_protects():
    assert traffic(xor_parity({"host": 5}), 10)["host"].nbytes == 5 * 4 * 10


def test_one_rank_has_no_other():
    with pytest.raises(InputError, match="parity wants at least 2 ranks, got 1"):
        xor_parity({"host": 1})
