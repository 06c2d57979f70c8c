"""The offloaded stage gives the resident stage's bits, whatever the cache went through."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.core.structs import Routing
from moejax.costmodel.miss import MissCosts
from moejax.costmodel.presched import LayerWork, serve_whole
from moejax.experts.gated import init_experts
from moejax.experts.stage import stacked
from moejax.offload.prefetch import fetch
from moejax.offload.preload import preload
from moejax.offload.source import source_of
from moejax.offload.stage import OffloadConfig, init_state, offloaded
from moejax.offload.store import to_host
from tests.exact import exact_jit

L, E, D, F = 2, 8, 16, 12
COSTS = MissCosts(fetch_s=3.0, host_read_s=1.0, host_row_s=0.7)


@pytest.fixture(scope="module")
def experts():
    return init_experts(jax.random.key(0), (L, E), D, F, out_scale=1.0, dtype=jnp.float32)


def routing_of(topk_idx):
    idx = jnp.asarray(topk_idx, jnp.int32)
    return Routing(
        topk_idx=idx,
        topk_weights=jnp.ones(idx.shape, jnp.float32),
        router_logits=jnp.zeros((idx.shape[0], E), jnp.float32),
    )


def random_calls(rng, calls, tokens, top_k, skew):
    """(layer, topk_idx) pairs with some padded tokens; experts follow a zipf law of `skew`."""
    weight = 1 / np.arange(1, E + 1) ** skew
    for i in range(calls):
        scores = np.log(weight) + rng.gumbel(size=(tokens, E))
        idx = np.argsort(-scores, axis=1)[:, :top_k]
        idx[rng.random(tokens) < 0.15] = E
        yield i % L, idx


def moved_by_plan(cfg, rows):
    """Of missing experts with so many rows each, how many the link moves, by the cost model."""
    if cfg.serve != "divide":
        return len(rows) if cfg.serve == "fetch" else 0
    host_s = np.maximum(COSTS.host_read_s, COSTS.host_row_s * np.sort(np.array(rows, float))[::-1])
    return serve_whole(LayerWork(host_s=host_s, fetch_s=COSTS.fetch_s)).moved


@pytest.mark.parametrize(
    "cfg, tokens",
    [
        (OffloadConfig(num_slots=6), 1),
        (OffloadConfig(num_slots=2), 5),  # one slot per layer, up to eight experts wanted
        (OffloadConfig(num_slots=1, quota="shared", policy="lfu"), 5),
        (OffloadConfig(num_slots=5, quota="shared", policy="random"), 3),
        pytest.param(OffloadConfig(num_slots=L * E), 5, marks=pytest.mark.full),
        (OffloadConfig(num_slots=5, quota=(4, 1), policy="average"), 3),
        (OffloadConfig(num_slots=6, serve="host"), 5),
        (OffloadConfig(num_slots=4, serve="divide", costs=COSTS), 5),
        pytest.param(
            OffloadConfig(num_slots=3, quota="shared", serve="divide", costs=COSTS),
            1,
            marks=pytest.mark.full,
        ),
    ],
)
def test_bits_and_counts(experts, cfg, tokens):
    """Outputs equal the resident stage's bitwise; counts equal a plain-Python cache's."""
    store = to_host(experts, make_mesh())
    rng = np.random.default_rng(1)

    @exact_jit
    def both(store, experts, x, routing, layer, state):
        ours, state, counts = offloaded(store, cfg)(x, routing, None, layer, state)
        theirs, _, _ = stacked(experts)(x, routing, None, layer, None)
        return ours, theirs, state, counts

    state, held = init_state(store, cfg), set()
    for layer, idx in random_calls(rng, 12, tokens, 3, 1.0):
        x = jnp.asarray(rng.normal(size=(tokens, D)), jnp.float32)
        ours, theirs, state, counts = both(
            store, experts, x, routing_of(idx), jnp.int32(layer), state
        )
        np.testing.assert_array_equal(ours, theirs)
        wanted = {layer * E + int(e) for e in idx.ravel() if e < E}
        assert int(counts.lookups) == len(wanted)
        assert int(counts.hits) == len(wanted & held)
        moved = moved_by_plan(cfg, [idx[idx == g % E].size for g in wanted - held])
        assert int(counts.demand_fetches) == moved
        assert int(counts.host_computes) == len(wanted - held) - moved
        slots = {"layer": cfg.num_slots // L, "shared": cfg.num_slots}.get(cfg.quota)
        slots = slots or cfg.quota[layer]
        free = slots - len(wanted & held)
        assert int(counts.waves) == 1 + moved - min(moved, free)
        held = {int(g) for g in state.cache.table.granule_of if g >= 0}
        if cfg.serve != "fetch":
            continue
        # What was fetched is there, as far as the layer's slots go.
        assert len(wanted & held) >= min(len(wanted), slots) - (cfg.quota == "shared")
    for slot, granule in enumerate(np.asarray(state.cache.table.granule_of)):
        if granule >= 0:
            np.testing.assert_array_equal(
                state.cache.rows.w_up[slot], experts.w_up.reshape(L * E, D, F)[granule]
            )


@pytest.mark.parametrize(
    "num_slots, top_k, mode", [(6, 2, "missing"), (7, 3, "missing"), (6, 2, "always")]
)
def test_prefetched_experts_serve_a_layer_that_wants_more_than_its_slots(
    experts, num_slots, top_k, mode
):
    """Landed experts without a slot are hits in mode `missing`, as far as the slots go."""
    cfg = OffloadConfig(num_slots=num_slots, prefetch_lanes=3, fetch_mode=mode)
    store = to_host(experts, make_mesh())
    rng = np.random.default_rng(2)
    tokens = 4

    def scorer(x, routing, layer, state):
        return state, state  # the test is the predictor

    @exact_jit
    def both(store, experts, x, routing, layer, state):
        stage = offloaded(store, cfg, scorer=scorer)
        ours, state, counts = stage(x, routing, None, layer, state)
        theirs, _, _ = stacked(experts)(x, routing, None, layer, None)
        return ours, theirs, state, counts

    state = init_state(store, cfg, predictor=jnp.zeros((tokens, E)))
    used_late, held, landed = 0, set(), set()
    for layer, idx in random_calls(rng, 16, tokens, top_k, 0.3):
        x = jnp.asarray(rng.normal(size=(tokens, D)), jnp.float32)
        state = dataclasses.replace(
            state, predictor=jnp.asarray(rng.normal(size=(tokens, E)), jnp.float32)
        )
        ours, theirs, state, counts = both(
            store, experts, x, routing_of(idx), jnp.int32(layer), state
        )
        np.testing.assert_array_equal(ours, theirs)
        wanted = {layer * E + int(e) for e in idx.ravel() if e < E}
        absent, waiting = len(wanted - held), len(wanted & landed - held)
        slots = num_slots // L + (num_slots % L > layer)
        early = min(waiting, slots - len(wanted & held))
        late = max(0, min(waiting - early, absent - early - 1, slots - 1))
        late *= mode == "missing"
        assert int(counts.hits) == len(wanted & held) + early + late
        assert int(counts.demand_fetches) == absent - early - late
        assert int(counts.prefetches) == len(landed)
        assert int(counts.prefetches_wasted) == len(landed) - early - late
        used_late += late
        held = {int(g) for g in state.cache.table.granule_of if g >= 0}
        landed = {int(g) for g in state.landing.granule if g >= 0}
    assert used_late >= 3 or mode == "always"
    for slot, granule in enumerate(np.asarray(state.cache.table.granule_of)):
        assert granule >= 0
        np.testing.assert_array_equal(
            state.cache.rows.w_up[slot], experts.w_up.reshape(L * E, D, F)[granule]
        )


@pytest.mark.parametrize(
    "arrived, idx, hits, wasted",
    [
        ((5, 6), [[0, 1, 2, 3], [4, 5, 6, 7]], 7, 0),
        # One comes by demand: behind it the slots are computed and given to the others.
        ((5, 6, 7), [[0, 1, 2, 3], [4, 5, 6, 7]], 7, 1),
        ((5, 6, 7), [[0, 1, 2, 3], [E, 5, 6, 7]], 6, 1),  # the slot of 4 is free from the start
    ],
)
def test_landed_experts_wait_for_slots_that_hold_wanted_ones(experts, arrived, idx, hits, wasted):
    """Experts 0 to 4 fill the five slots of layer 1."""
    cfg = OffloadConfig(num_slots=5 * L, prefetch_lanes=len(arrived))
    x = jnp.linspace(-1, 1, 2 * D, dtype=jnp.float32).reshape(2, D)
    routing, layer = routing_of(idx), jnp.int32(1)

    @exact_jit
    def run(store, experts):
        state = init_state(store, cfg)
        cache = preload(state.cache, source_of(store), E + jnp.arange(5, dtype=jnp.int32))
        granule, live = E + jnp.array(arrived, jnp.int32), jnp.ones(len(arrived), bool)
        landing = fetch(source_of(store), state.landing, granule, live, "always")
        state = dataclasses.replace(state, cache=cache, landing=landing)
        ours, _, counts = offloaded(store, cfg)(x, routing, None, layer, state)
        return ours, stacked(experts)(x, routing, None, layer, None)[0], counts

    ours, theirs, counts = run(to_host(experts, make_mesh()), experts)
    np.testing.assert_array_equal(ours, theirs)
    assert (int(counts.hits), int(counts.prefetches_wasted)) == (hits, wasted)
    assert int(counts.demand_fetches) == 1 and int(counts.waves) == 2


def test_bfloat16_cache_is_written_in_place(experts):
    """XLA:CPU would widen the whole cache for every bfloat16 write; the cache holds bits."""
    cfg = OffloadConfig(num_slots=11, quota="shared")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), experts)
    store = to_host(half, make_mesh())
    x = jnp.linspace(-1, 1, 3 * D, dtype=jnp.float32).reshape(3, D).astype(jnp.bfloat16)
    routing = routing_of([[0, 5, 2], [5, 1, 7], [E, E, E]])

    def step(store, half, state):
        ours, state, _ = offloaded(store, cfg)(x, routing, None, jnp.int32(1), state)
        return ours, stacked(half)(x, routing, None, jnp.int32(1), None)[0], state

    run = exact_jit(step, donate_argnums=2).lower(store, half, init_state(store, cfg)).compile()
    ours, theirs, state = run(store, half, init_state(store, cfg))
    np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))
    assert sorted(int(g) for g in state.cache.table.granule_of if g >= 0) == [8, 9, 10, 13, 15]
    assert not re.search(rf"f32\[11,({D},{F}|{F},{D})\]", run.as_text())


def test_nothing_wanted_moves_nothing_and_gives_zeros(experts):
    cfg = OffloadConfig(num_slots=4)
    store = to_host(experts, make_mesh())
    idx = np.full((3, 2), E)
    y, state, counts = jax.jit(
        lambda store, state: offloaded(store, cfg)(
            jnp.ones((3, D)), routing_of(idx), None, jnp.int32(1), state
        )
    )(store, init_state(store, cfg))
    assert not np.asarray(y).any() and y.shape == (3, 2, D)
    assert int(counts.lookups) == int(counts.demand_fetches) == 0
    assert (np.asarray(state.cache.table.granule_of) == -1).all()


@pytest.mark.parametrize("quota", ["shared", "layer"])
def test_compiled_step_copies_no_cache_and_calls_no_host(experts, quota):
    """Write phase before read phase: nothing of the cache's or the store's shape is copied, nor a
    landing buffer, which a fetch hoisted out of its loop would be.

    Six wanted experts may find fewer slots in a layer's quota, never in the shared pool.
    """
    cfg = OffloadConfig(
        num_slots=11, prefetch_lanes=2, quota=quota, policy="average", admission=quota == "layer"
    )

    def scorer(x, routing, layer, state):
        return x[:, :E] * (1.0 + layer.astype(jnp.float32)), state

    @jax.jit
    def step(store, x, idx, state):
        stage = offloaded(store, cfg, scorer=scorer)

        def layer(carry, i):
            x, state = carry
            y, state, counts = stage(x, routing_of(idx), None, i, state)
            return (x + y.sum(1), state), counts

        return jax.lax.scan(layer, (x, state), jnp.arange(L, dtype=jnp.int32))

    store = to_host(experts, make_mesh())
    args = (store, jnp.ones((2, D)), jnp.zeros((2, 3), jnp.int32), init_state(store, cfg))
    lowered = jax.jit(step, donate_argnums=3).lower(*args)
    text = lowered.compile().as_text()
    whole = [rf"\[{rows}{D},{F}\]" for rows in ("", "11,", f"{L * E},")] + [
        rf"\[{rows}{F},{D}\]" for rows in ("", "11,")
    ]
    copies = [
        line.strip()[:160]
        for line in text.splitlines()
        if any(re.search(rf"= \S*{shape}\S* copy\(", line) for shape in whole)
    ]
    assert not copies, copies
    assert "callback" not in text and "callback" not in lowered.as_text()


def test_a_rank_with_fewer_experts_than_lanes_is_refused(experts):
    with pytest.raises(InputError, match="prefetch_lanes=9 exceeds the 8 experts of a rank"):
        init_state(experts, OffloadConfig(num_slots=4, prefetch_lanes=9))
    with pytest.raises(InputError, match="num_slots=0 must be at least 1"):
        OffloadConfig(num_slots=0)
    with pytest.raises(InputError, match="num_slots=1 is fewer than one for each of 2"):
        init_state(experts, OffloadConfig(num_slots=1))
