"""What is fetched ahead, what of it enters the cache, and what counts as wasted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.experts.gated import init_experts
from moejax.offload import prefetch
from moejax.offload.policies import lru
from moejax.offload.slots import assign, init_cache, shared_slots, touch_layer
from moejax.offload.source import source_of
from moejax.offload.store import flatten

L, E = 2, 4


@pytest.fixture
def store(key):
    return init_experts(key, (L, E), 8, 4, out_scale=1.0, dtype=jnp.float32)


def mask(*experts):
    return jnp.zeros((E,), bool).at[jnp.array(experts, jnp.int32)].set(True)


def cache_with(store, *granules, slots=3):
    cache = init_cache(store, shared_slots(slots))
    table = cache.table
    for slot, granule in enumerate(granules):
        table = assign(table, jnp.int32(slot), jnp.int32(granule))
    return cache.replace(table=table)


def landed(store, *granules):
    landing = prefetch.init_landing(store, len(granules))
    ids = jnp.array(granules, jnp.int32)
    fetched = jax.jit(lambda s, g: prefetch.fetch(source_of(s), landing, g, g >= 0, "missing"))
    return fetched(store, ids)


def test_demand_counts_predicted_assignments_of_valid_tokens():
    scores = jnp.array([[9.0, 8.0, 0.0, 0.0], [9.0, 0.0, 8.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    votes = prefetch.demand(scores, jnp.array([True, True, False]), 2)
    assert np.argsort(-np.asarray(votes))[0] == 0
    assert 2 <= float(votes[0]) < 4 and 1 <= float(votes[1]) < 2 and float(votes[3]) < 0.1


def test_demand_of_extreme_scores_votes_for_the_top_k_only():
    """softmax([200, 0, -1, -2]) underflows to three zeros."""
    votes = prefetch.demand(jnp.array([[200.0, 0.0, -1.0, -2.0]]), jnp.array([True]), 2)
    np.testing.assert_allclose(votes, [2, 1, 0, 0], atol=1e-6)


def test_missing_mode_fetches_what_is_predicted_and_not_cached(store):
    cache = cache_with(store, E + 2)  # layer 1, expert 2
    votes = jnp.array([0.1, 1.9, 1.8, 0.2])
    granule, live = prefetch.choose(votes, cache.table, jnp.int32(0), 2, "missing")
    assert granule[0] == E + 1 and E + 2 not in granule.tolist()
    assert live.tolist() == [True, False]


def test_always_mode_skips_cached_experts_and_fills_every_lane(store):
    cache = cache_with(store, E + 2)
    votes = jnp.array([0.1, 0.9, 0.8, 0.2])
    granule, live = prefetch.choose(votes, cache.table, jnp.int32(0), 2, "always")
    assert granule.tolist() == [E + 1, E + 3]
    assert live.tolist() == [True, True]


def test_after_the_last_layer_missing_fetches_nothing_and_always_the_most_used_of_layer_0(store):
    cache = cache_with(store)
    table = touch_layer(cache.table, jnp.int32(0), mask(3).astype(jnp.int32))
    votes = jnp.array([0.9, 0.8, 0.1, 0.0])
    _, live = prefetch.choose(votes, table, jnp.int32(L - 1), 2, "missing")
    assert live.tolist() == [False, False]
    granule, _ = prefetch.choose(votes, table, jnp.int32(L - 1), 1, "always")
    assert granule.tolist() == [3]


def test_fetch_brings_the_rows_and_leaves_dead_lanes(store):
    landing = landed(store, E + 1, -1)
    np.testing.assert_array_equal(landing.experts[0].w_up, store.w_up[1, 1])
    assert not landing.experts[1].w_up.any()
    assert landing.granule.tolist() == [E + 1, -1]


@pytest.mark.parametrize(
    "granules, wanted, cached, used, slot_of",
    [
        ((E + 1, E + 2), (1, 2), (), 2, {E + 1: 0, E + 2: 1}),
        ((E + 1, E + 2), (1, 3), (), 1, {E + 1: 0, E + 2: -1}),
        ((E + 1, -1), (1,), (E + 1,), 0, {E + 1: 0}),  # came in by a miss meanwhile
        ((-1, -1), (0,), (), 0, {}),
    ],
)
def test_absorb_takes_what_is_wanted_and_absent(store, granules, wanted, cached, used, slot_of):
    cache = cache_with(store, *cached)
    landing, wanted = landed(store, *granules), mask(*wanted)
    absorb = jax.jit(lambda c: prefetch.absorb(c, landing, jnp.int32(1), wanted, wanted, lru))
    out, count = absorb(cache)
    assert int(count) == used
    for granule, slot in slot_of.items():
        assert int(out.table.slot_of[granule]) == slot
        if slot >= 0 and granule not in cached:
            np.testing.assert_array_equal(out.rows.w_gate[slot], flatten(store).w_gate[granule])


def test_absorb_never_evicts_an_expert_to_keep(store):
    cache = cache_with(store, E + 0, E + 1, slots=2)
    landing, wanted, layer = landed(store, E + 2, E + 3), mask(0, 1, 2, 3), jnp.int32(1)
    out, used = prefetch.absorb(cache, landing, layer, wanted, wanted, lru)
    assert int(used) == 0 and out.table.granule_of.tolist() == [E, E + 1]
    out, used = prefetch.absorb(cache, landing, layer, mask(2), mask(1, 2), lru)
    assert int(used) == 1 and out.table.granule_of.tolist() == [E + 2, E + 1]
    np.testing.assert_array_equal(out.rows.w_up[0], store.w_up[1, 2])


def test_landed_experts_are_those_of_the_layer(store):
    landing = landed(store, E + 2, 0, -1)
    assert prefetch.landed_experts(landing, jnp.int32(1), E).tolist() == mask(2).tolist()
