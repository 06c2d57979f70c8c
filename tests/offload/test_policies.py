"""Policies order granules as their names say."""

from typing import get_args

import jax.numpy as jnp
import numpy as np

from moejax.offload.policies import (
    DECAY,
    POLICIES,
    PolicyName,
    average,
    init_usage,
    lfu,
    lru,
    pick_victim,
    random,
    touch,
)


def mask(*ids, n=5):
    return jnp.zeros((n,), bool).at[jnp.array(ids, jnp.int32)].set(True)


def eviction_order(policy, usage, n=5):
    left, order = mask(*range(n)), []
    while left.any():
        order.append(int(pick_victim(policy(usage), left)))
        left = left.at[order[-1]].set(False)
    return order


def history():
    usage = init_usage(5)
    for ids in [(0, 1, 2), (0, 3), (0, 1), (3,)]:
        usage = touch(usage, mask(*ids).astype(jnp.int32))
    return usage


def test_lru_evicts_the_never_used_then_the_least_recent():
    assert eviction_order(lru, history()) == [4, 2, 0, 1, 3]


def test_lfu_evicts_the_fewest_uses_and_the_least_recent_of_equals():
    # uses: 0 three times, 1 twice (last at 2), 2 once, 3 twice (last at 3), 4 never
    assert eviction_order(lfu, history()) == [4, 2, 1, 3, 0]


def test_average_evicts_the_lowest_moving_average_of_rows_and_the_least_recent_of_equals():
    usage, expected = init_usage(5), np.zeros(5)
    for rows in ([0, 3, 0, 0, 0], [1, 0, 0, 1, 0], [0, 0, 4, 0, 0], [0, 0, 0, 0, 2]):
        usage = touch(usage, jnp.array(rows, jnp.int32))
        expected = (1 - DECAY) * expected + DECAY * np.array(rows)
    np.testing.assert_allclose(usage.average, expected, rtol=1e-6)
    # 0 and 3 are equal in both parts, so the first goes.
    assert eviction_order(average, usage) == [0, 3, 4, 1, 2]
    never = usage.replace(average=jnp.zeros(5), last_used=jnp.array([4, 3, 2, 1, 0], jnp.int32))
    assert eviction_order(average, never) == [4, 3, 2, 1, 0]


def test_every_policy_has_its_name():
    assert set(POLICIES) == set(get_args(PolicyName))


def test_only_candidates_are_evicted():
    assert int(pick_victim(lru(history()), mask(1, 3))) == 1


def test_random_is_a_permutation_that_changes_with_the_clock_and_covers_everything():
    usage, seen = init_usage(5), []
    for _ in range(60):
        order = eviction_order(random, usage)
        assert sorted(order) == list(range(5))
        seen.append(order[0])
        usage = touch(usage, mask(0).astype(jnp.int32))
    counts = np.bincount(seen, minlength=5)
    assert counts.min() >= 4, counts
