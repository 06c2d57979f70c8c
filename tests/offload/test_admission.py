"""Admission by moving average: its rule, and the stage that follows it, beside plain Python."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.experts.gated import init_experts
from moejax.experts.stage import stacked
from moejax.offload.admission import is_worth_moving, is_worth_slot, rank_by_average
from moejax.offload.policies import DECAY
from moejax.offload.prefetch import choose
from moejax.offload.slots import assign, init_table, layer_slots, touch_layer
from moejax.offload.stage import OffloadConfig, init_state, offloaded
from moejax.offload.store import to_host
from tests.exact import exact_jit
from tests.offload.test_stage import D, E, F, L, routing_of

SLOTS = 3  # of a layer


@pytest.fixture(scope="module")
def table():
    """Layer 1 has averages 0, .1, .2, ... and holds experts 2 and 4, beside an empty slot."""
    table = init_table(L, E, layer_slots(L * SLOTS, L))
    table = touch_layer(table, jnp.int32(1), jnp.arange(E, dtype=jnp.int32))
    table = assign(table, jnp.int32(SLOTS), jnp.int32(E + 2))
    return assign(table, jnp.int32(SLOTS + 1), jnp.int32(E + 4))


def test_predicted_experts_come_before_those_of_a_high_average(table):
    votes = jnp.array([0.9, 3.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    rank = rank_by_average(votes, table, jnp.int32(1))
    assert np.argsort(-np.asarray(rank)).tolist() == [1, 5, 7, 6, 4, 3, 2, 0]
    assert ((rank >= 1) == (votes >= 1)).all()


def test_only_used_and_absent_experts_above_the_least_cached_one_are_moved(table):
    granules = E + jnp.arange(E, dtype=jnp.int32)
    one, full = jnp.int32(1), assign(table, jnp.int32(SLOTS + 2), jnp.int32(E + 3))
    worth = is_worth_moving(table, one, granules)
    assert np.flatnonzero(worth).tolist() == [1, 3, 5, 6, 7]
    assert np.flatnonzero(is_worth_moving(full, one, granules)).tolist() == [5, 6, 7]
    slots = [jnp.int32(SLOTS + i) for i in range(SLOTS)]
    worth = [bool(is_worth_slot(table, slot, jnp.int32(E + 3))) for slot in slots]
    assert worth == [True, False, True]


def test_lanes_that_no_prediction_wants_admit_while_the_link_is_idle(table):
    votes = jnp.zeros((E,)).at[0].set(1.5)
    for idle, live in ((True, [True, True]), (False, [True, False])):
        granule, found = choose(votes, table, jnp.int32(0), 2, "missing", jnp.bool(idle))
        assert granule.tolist() == [E, E + 7] and found.tolist() == live
    # The last layer's votes are for nobody: layer 0, never used, has nothing to bring.
    _, found = choose(votes, table, jnp.int32(1), 2, "missing", jnp.bool(True))
    assert not found.any()


class PlainCache:
    """The rule of the stage, in Python: one token per call, slots of a layer in order."""

    def __init__(self, cfg):
        self.cfg, self.landed, self.clock = cfg, [], 0
        self.slots = [[None] * SLOTS for _ in range(L)]
        self.average = np.zeros((L, E), np.float32)
        self.last = np.full((L, E), -1)

    def call(self, layer, wanted):
        """(lookups, hits, demand fetches, host computes, prefetches, wasted) of a call."""
        cfg, slots = self.cfg, self.slots[layer]
        rows = np.isin(np.arange(E), wanted).astype(np.float32)
        self.average[layer] = (1 - DECAY) * self.average[layer] + DECAY * rows
        self.last[layer, wanted] = self.clock
        self.clock += 1
        landed, used = self.landed, 0
        for expert in [e for e in landed if e in wanted]:
            slots[self.victim(layer, wanted)] = expert
            used += 1
        hits = [e for e in wanted if e in slots]
        missing = sorted(e for e in wanted if e not in slots)
        moved = missing if cfg.serve == "fetch" else []
        for expert in moved:
            slots[self.victim(layer, wanted)] = expert
        if cfg.admission:
            used += self.admit(layer, landed, wanted)
        self.landed = self.choose((layer + 1) % L, bool(moved)) if cfg.admission else []
        on_host = len(missing) - len(moved)
        return len(wanted), len(hits), len(moved), on_host, len(landed), len(landed) - used

    def granules(self):
        """What every slot holds, -1 for an empty one."""
        return [-1 if e is None else i * E + e for i, row in enumerate(self.slots) for e in row]

    def victim(self, layer, keep):
        def key(i):
            held = self.slots[layer][i]
            return (-1, -1) if held is None else (self.average[layer, held], self.last[layer, held])

        return min((i for i in range(SLOTS) if self.slots[layer][i] not in keep), key=key)

    def worth(self, layer, expert):
        return 0 if expert is None else self.average[layer, expert]

    def admit(self, layer, landed, keep):
        slots, count = self.slots[layer], 0
        for expert in [e for e in landed if e not in slots]:
            slot = self.victim(layer, keep)
            if slots[slot] is None or self.average[layer, expert] > self.worth(layer, slots[slot]):
                slots[slot] = expert
                count += 1
        return count

    def choose(self, layer, busy):
        absent = [e for e in range(E) if e not in self.slots[layer]]
        best = sorted(absent, key=lambda e: -self.average[layer, e])
        best = best[: self.cfg.prefetch_lanes]
        if self.cfg.fetch_mode == "always":
            return best
        least = min(self.worth(layer, e) for e in self.slots[layer])
        return [] if busy else [e for e in best if self.average[layer, e] > least]


def drifting_calls(calls):
    """(layer, experts of one token): two of three favourites, others in the second half; an outlier
    now and then."""
    rng = np.random.default_rng(3)
    for i in range(calls):
        favourites = [1, 4, 6] if i < calls // 2 else [0, 3, 7]
        pool = favourites if rng.random() < 0.8 else range(E)
        yield i % L, sorted(rng.choice(pool, 2, replace=False).tolist())


def scan_calls(call, experts, cfg=None):
    """`call` over `drifting_calls`, one token each: (last state, what it gave)."""
    layers, chosen = zip(*drifting_calls(80), strict=True)
    x = jnp.linspace(-1, 1, 80 * D, dtype=jnp.float32).reshape(80, 1, D)
    calls = (jnp.array(layers, jnp.int32), x, jnp.array(chosen, jnp.int32)[:, None])

    @exact_jit
    def run(experts, calls):
        state = None if cfg is None else init_state(experts, cfg)
        return jax.lax.scan(partial(call, experts), state, calls)

    return run(experts, calls)


@pytest.fixture(scope="module")
def resident():
    """Experts on the device, and what they answer to `drifting_calls`."""
    experts = init_experts(jax.random.key(0), (L, E), D, F, out_scale=1.0, dtype=jnp.float32)

    def call(experts, state, of_call):
        layer, x, idx = of_call
        return state, stacked(experts)(x, routing_of(idx), None, layer, None)[0]

    return experts, scan_calls(call, experts)[1]


def config(lanes, **kwargs):
    kwargs |= {"prefetch_lanes": lanes, "admission": lanes > 0}
    return OffloadConfig(num_slots=L * SLOTS, policy="average", **kwargs)


@pytest.mark.parametrize(
    "cfg",
    [
        config(2),
        config(1, serve="host"),
        pytest.param(config(2, fetch_mode="always"), marks=pytest.mark.full),
    ],
    ids=["missing", "host", "always"],
)
def test_the_stage_follows_the_rule_and_gives_the_resident_bits(resident, cfg):
    experts, outputs = resident

    def call(store, state, of_call):
        layer, x, idx = of_call
        y, state, counts = offloaded(store, cfg)(x, routing_of(idx), None, layer, state)
        return state, (y, counts, state.cache.table.granule_of)

    state, (y, counts, held) = scan_calls(call, to_host(experts, make_mesh()), cfg)
    np.testing.assert_array_equal(y, outputs)
    plain, names = PlainCache(cfg), ("lookups", "hits", "demand_fetches", "host_computes")
    names = (*names, "prefetches", "prefetches_wasted")
    for i, (layer, wanted) in enumerate(drifting_calls(80)):
        expected = plain.call(layer, wanted)
        assert tuple(int(getattr(counts, name)[i]) for name in names) == expected
        assert held[i].tolist() == plain.granules()
    rows = experts.w_up.reshape(L * E, D, F)[held[-1]]
    np.testing.assert_array_equal(state.cache.rows.w_up, rows)


def test_admission_hits_more_than_none_after_the_favourites_change():
    hits = {}
    for serve in ("fetch", "host"):
        for lanes in (0, 1, 2):
            plain = PlainCache(config(lanes, serve=serve))
            counts = [plain.call(layer, wanted) for layer, wanted in drifting_calls(80)]
            hits[serve, lanes] = sum(count[1] for count in counts[40:])
    assert hits["fetch", 2] > hits["fetch", 0]
    # What the host computes never enters the cache: admission alone fills it.
    assert hits["host", 2] >= hits["host", 1] > 50 and hits["host", 0] == 0


@pytest.mark.parametrize("lanes, policy", [(0, "average"), (1, "lfu")])
def test_admission_without_lanes_or_averages_is_refused(lanes, policy):
    with pytest.raises(InputError, match=f"policy='average', got {lanes} and {policy!r}"):
        OffloadConfig(num_slots=4, admission=True, prefetch_lanes=lanes, policy=policy)
