import pytest

from moejax.collectives.doubling import (
    doubling_all_gather,
    doubling_broadcast,
    halving_doubling_all_reduce,
    halving_reduce_scatter,
    recursive_doubling_all_reduce,
)
from moejax.collectives.traffic import traffic
from moejax.core.errors import InputError


@pytest.mark.parametrize("ranks, steps", [(1, 0), (2, 1), (5, 3), (8, 3), (9, 4)])
def test_a_tree_informs_twice_as_many_each_step(ranks, steps):
    schedule = doubling_broadcast({"expert": ranks})
    assert len(schedule.steps) == steps
    assert sum(len(step.transfers) for step in schedule.steps) == ranks - 1


@pytest.mark.parametrize("ranks, folds", [(8, 0), (5, 2), (7, 2)])
def test_steps_are_logarithmic(ranks, folds):
    power = 8 if ranks == 8 else 4
    short = recursive_doubling_all_reduce({"expert": ranks})
    long = halving_doubling_all_reduce({"expert": ranks})
    log = power.bit_length() - 1
    assert (len(short.steps), len(long.steps)) == (log + folds, 2 * log + folds)
    folded = 2 * (ranks - power) * power  # chunks there and back
    assert traffic(long, 1)["expert"].nbytes == 2 * power * (power - 1) + folded


@pytest.mark.parametrize("build", [halving_reduce_scatter, doubling_all_gather])
def test_other_numbers_are_refused(build):
    with pytest.raises(InputError, match="want a power of two, got 6 ranks"):
        build({"data": 2, "expert": 3})
