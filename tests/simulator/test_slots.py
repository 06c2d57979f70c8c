import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.costmodel.admission import Swap
from moejax.offload import policies
from moejax.offload.policies import POLICIES, Usage, init_usage, pick_victim
from moejax.simulator.plans import Plan
from moejax.simulator.slots import fill_slots, insert, swap_in, touch
from moejax.simulator.workload import lanes_of_trace, make_workload
from tests.simulator.test_stack import random_trace
from tests.simulator.test_workload import FACTS


@pytest.fixture(scope="module")
def work():
    lanes = lanes_of_trace(random_trace(lengths=(20, 18), skip=0), 1)
    return make_workload(lanes, slice(0, 19), slice(19, 38), recall=0.8, **FACTS)


@pytest.mark.parametrize("keep", ["lru", "lfu", "average"])
def test_victims_are_those_of_the_compiled_step(work, keep):
    cache = fill_slots(work, Plan(name="", serve="fetch", keep=keep), 8)
    for tokens in work.tokens:
        layer = cache.clock % 2
        wanted = tokens[layer] > 0
        touch(cache, layer, tokens[layer])
        resident = cache.resident[layer].copy()
        usage = Usage(
            last_used=jnp.array(cache.last_used[layer]),
            uses=jnp.array(cache.uses[layer]),
            average=jnp.array(cache.scores[layer]),
            clock=jnp.int32(cache.clock),
        )
        arrived = np.flatnonzero(wanted & ~resident)
        insert(cache, layer, arrived, wanted)
        for expert in arrived:
            if (resident & ~wanted).any():
                resident[int(pick_victim(POLICIES[keep](usage), jnp.array(resident & ~wanted)))] = 0
                resident[expert] = True
        np.testing.assert_array_equal(cache.resident[layer], resident)
    assert cache.resident.sum() == 8


def test_averages_are_those_of_the_compiled_step(work):
    cache = fill_slots(work, Plan(name="", serve="fetch", keep="average"), 8)
    usage = init_usage(work.tokens.shape[2]).replace(average=jnp.array(cache.scores[1]))
    for tokens in work.tokens[:5]:
        touch(cache, 1, tokens[1])
        usage = policies.touch(usage, jnp.array(tokens[1], jnp.int32))
    np.testing.assert_allclose(cache.scores[1], usage.average, rtol=1e-6)
    np.testing.assert_array_equal(cache.last_used[1], usage.last_used)


def test_caches_start_with_what_was_hot_and_quotas_follow_the_use(work):
    cache = fill_slots(work, Plan(name="", serve="fetch", keep="static"), 7)
    assert cache.resident.sum(1).tolist() == [4, 3]
    coldest = [work.past[layer][cache.resident[layer]].min() for layer in (0, 1)]
    assert all(coldest[x] >= work.past[x][~cache.resident[x]].max() for x in (0, 1))
    flat = dataclasses.replace(work, past=np.array([[9] * 7, [50, 40, 0, 0, 0, 0, 0]]))
    quotas = fill_slots(flat, Plan(name="", serve="fetch", keep="static", quotas=True), 7)
    assert quotas.resident.sum(1).tolist() == [5, 2]
    none = fill_slots(work, Plan(name="", serve="fetch"), 7)
    insert(none, 0, np.array([1]), work.tokens[0, 0] > 0)
    assert none.resident.sum() == 0


def test_a_swap_ends_only_if_both_places_are_still_as_it_found_them(work):
    cache = fill_slots(work, Plan(name="", serve="fetch", keep="average"), 6)
    cache.resident[1] = [True, False, False, True, False, False, False]
    swap_in(cache, Swap(layer=1, incoming=2, outgoing=0, gain=1.0))
    assert np.flatnonzero(cache.resident[1]).tolist() == [2, 3]
    swap_in(cache, Swap(layer=1, incoming=4, outgoing=0, gain=1.0))
    swap_in(cache, Swap(layer=1, incoming=2, outgoing=3, gain=1.0))
    assert np.flatnonzero(cache.resident[1]).tolist() == [2, 3]
