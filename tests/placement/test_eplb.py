"""EPLB against the example of its README, and against properties of greedy balancing."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.placement.eplb import balanced_packing, rank_loads, rebalance, replicate_experts

# deepseek-ai/EPLB, README: two layers of 12 experts, 16 slots, 4 groups, 2 nodes, 8 ranks.
WEIGHTS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
SIZES = {"num_slots": 16, "num_ranks": 8}


def balance(loads):
    """Mean over maximum, both summed over layers."""
    return loads.mean(1).sum() / loads.max(1).sum()


def test_the_known_answer():
    slots = rebalance(WEIGHTS, **SIZES, num_groups=4, num_nodes=2)
    assert slots.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    counts = [np.bincount(row).tolist() for row in slots]
    assert counts == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    loads = rank_loads(WEIGHTS, slots, 8)
    assert loads[0].tolist() == [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152]
    assert balance(loads) == pytest.approx(0.815574, abs=1e-6)
    assert balance(rank_loads(WEIGHTS, slots, 16)) == pytest.approx(0.550553, abs=1e-6)
    assert balance(rank_loads(WEIGHTS, rebalance(WEIGHTS, **SIZES), 8)) == pytest.approx(
        0.881240, abs=1e-6
    )


def test_groups_that_do_not_divide_over_nodes_are_ignored():
    want = rebalance(WEIGHTS, **SIZES)
    np.testing.assert_array_equal(rebalance(WEIGHTS, **SIZES, num_groups=3, num_nodes=2), want)


def test_packs_are_full_and_places_distinct():
    weights = np.random.default_rng(0).lognormal(size=24)
    pack, place = balanced_packing(weights, 6)
    assert sorted(zip(pack, place, strict=True)) == [(p, i) for p in range(6) for i in range(4)]
    loads = np.bincount(pack, weights)
    assert loads.max() - loads.min() <= weights.max()
    assert balanced_packing(weights, 24)[0].tolist() == list(range(24))


def test_no_other_copies_have_a_lighter_busiest_one():
    """Greedy replication is optimal: against all ways to give 4 copies to 3 experts."""
    rng = np.random.default_rng(1)
    for weights in rng.lognormal(size=(20, 3)):
        slots, count = replicate_experts(weights, 7)
        assert np.bincount(slots).tolist() == count.tolist() and count.sum() == 7
        others = [
            max(weights / (1 + np.array([i, j, 4 - i - j]))) for i in range(5) for j in range(5 - i)
        ]
        assert max(weights / count) == min(others)


def test_wrong_input():
    for arguments, message in [
        ({"num_slots": 8, "num_ranks": 8}, "8 slots cannot hold 12 experts"),
        ({"num_slots": 15, "num_ranks": 8}, "num_slots=15 is not divisible by num_ranks=8"),
        ({**SIZES, "num_groups": 8}, "num_experts=12 is not divisible by num_groups=8"),
        ({**SIZES, "num_groups": 6, "num_nodes": 3}, "num_ranks=8 is not divisible by num_nodes=3"),
    ]:
        with pytest.raises(InputError, match=message):
            rebalance(WEIGHTS, **arguments)
    with pytest.raises(InputError, match=r"weights have shape \(12,\), expected \[L, E\]"):
        rebalance(WEIGHTS[0], **SIZES)
    with pytest.raises(InputError, match="7 items are not divisible by 2 packs"):
        balanced_packing(np.ones(7), 2)
