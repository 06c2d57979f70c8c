"""Precision by router weight: the rule, and that every expert is served in the one it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.core.structs import Routing
from moejax.experts.gated import init_experts
from moejax.experts.quantize import quantize_experts
from moejax.experts.stage import stacked
from moejax.kernels.quantized import dequantize_tree
from moejax.offload import stage, waves, work
from moejax.offload.precision import TwoPrecisions, important_experts, in_two_precisions
from moejax.offload.stage import OffloadConfig, init_state, offloaded
from moejax.offload.store import EXPERT_SPEC, to_host

L, E, D, F, K = 2, 8, 16, 8, 3


@functools.cache
def experts():
    return init_experts(jax.random.key(0), (L, E), D, F, out_scale=1.0, dtype=jnp.float32)


@functools.cache
def in_int4():
    """What the experts are behind quantisation."""
    return dequantize_tree(quantize_experts(experts(), "int4"), jnp.float32)


def mixed(low):
    """Experts [L, E, ...], those where `low` (bool [L, E]) as int4 stands for them."""
    pick = low[:, :, None, None]
    return jax.tree.map(lambda a, b: np.where(pick, a, b), in_int4(), experts())


def important_by_loops(idx, weights, threshold):
    """The rule, an assignment at a time."""
    found = set()
    for chosen, weight in zip(idx.tolist(), weights, strict=True):
        before, total = np.float32(0), weight.sum()
        for k in np.argsort(-weight, kind="stable"):
            if chosen[k] < E and before / total <= threshold:
                found.add(chosen[k])
            before += weight[k]
    return found


def random_routing(rng, tokens):
    """Choices and their weights, in no order; some tokens are padding."""
    idx = np.stack([rng.choice(E, K, replace=False) for _ in range(tokens)])
    weights = rng.dirichlet(np.full(K, 0.6), tokens).astype(np.float32)
    idx[rng.random(tokens) < 0.1] = E
    return idx, weights


def routing_of(idx, weights):
    return Routing(
        topk_idx=jnp.asarray(idx, jnp.int32),
        topk_weights=jnp.asarray(weights),
        router_logits=jnp.zeros((len(idx), E), jnp.float32),
    )


def test_the_rule():
    rng, rule = np.random.default_rng(0), jax.jit(important_experts, static_argnums=3)
    for threshold, least, most in ((0.0, 1, 1), (0.6, 1, K), (1.0, K, K), (-0.1, 0, 0)):
        for tokens in (1, 5, 5):
            idx, weights = random_routing(rng, tokens)
            important = np.asarray(rule(idx, weights, threshold, E))
            want = important_by_loops(idx, weights, threshold)
            assert set(np.flatnonzero(important)) == want
            if tokens == 1 and idx.max() < E:
                assert least <= len(want) <= most
    chosen = np.array([[4, 2, 7]])
    ties = rule(chosen, np.full((1, K), 0.5, np.float32), 0.4, E)
    assert np.flatnonzero(ties).tolist() == [2, 4]
    nothing = rule(chosen, np.zeros((1, K), np.float32), 0.4, E)
    assert np.flatnonzero(nothing).tolist() == [2, 4, 7]
    with pytest.raises(InputError, match="top_k=1: the only expert of a token is never unimport"):
        important_experts(jnp.array([[4]]), jnp.ones((1, 1)), 0.4, E)


@jax.jit
def resident(mix, x, routing, layer):
    return stacked(mix)(x, routing, None, layer, None)[0]


def assert_close(ours, theirs):
    """Far closer than int4 is to full weights, which is ten per cent."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_every_expert_is_served_in_the_precision_it_is_due(monkeypatch):
    check_serving(monkeypatch, OffloadConfig(num_slots=6, importance_threshold=0.5))


def test_the_same_where_transfers_overlap(monkeypatch):
    """The waves of an accelerator, run on the CPU."""
    monkeypatch.setattr(waves, "_in_turn", waves._overlapped)
    monkeypatch.setattr(work, "num_joined", lambda work: jnp.zeros_like(work.num_moved))
    check_serving(monkeypatch, OffloadConfig(num_slots=5, quota="shared", importance_threshold=0.5))


def check_serving(monkeypatch, cfg):
    """Outputs and counts are those of a plain cache that knows which of its rows are of few bits.

    Which rows it keeps is taken from the table. The threshold is an argument of one program here,
    and is one for a while: all in full, none, and between.
    """
    two, tokens = in_two_precisions(to_host(experts(), make_mesh()), "int4"), 4

    @jax.jit
    def serve(two, x, routing, layer, state, threshold):
        def rule(idx, weights, configured, num_experts):
            assert configured == cfg.importance_threshold
            return important_experts(idx, weights, threshold, num_experts)

        with monkeypatch.context() as patch:
            patch.setattr(stage, "important_experts", rule)
            return offloaded(two, cfg)(x, routing, None, layer, state)

    rng, state, held = np.random.default_rng(1), init_state(two.full, cfg), {}
    low_fetches, refetches = dict.fromkeys((1.0, 0.5, -1.0), 0), 0
    for call, threshold in enumerate(np.repeat([1.0, 0.5, -1.0, 0.5], 6).tolist()):
        layer, (idx, weights) = call % L, random_routing(rng, tokens)
        important = {layer * E + e for e in important_by_loops(idx, weights, threshold)}
        wanted = {layer * E + int(e) for e in idx.ravel() if e < E}
        hits = {g for g in wanted & set(held) if not held[g] or g not in important}
        low = {g: g not in important for g in wanted - hits} | {g: held[g] for g in hits}
        mask = np.array([low.get(g, False) for g in range(L * E)]).reshape(L, E)
        x, routing = rng.normal(size=(tokens, D)).astype(np.float32), routing_of(idx, weights)
        y, state, counts = serve(two, x, routing, jnp.int32(layer), state, jnp.float32(threshold))
        assert_close(y, resident(mixed(mask), x, routing, jnp.int32(layer)))
        assert int(counts.lookups) == len(wanted) and int(counts.hits) == len(hits)
        assert int(counts.demand_fetches) == len(wanted - hits)
        assert int(counts.low_fetches) == sum(low[g] for g in wanted - hits)
        low_fetches[threshold] += int(counts.low_fetches)
        refetches += len(wanted & set(held) - hits)
        slots = zip(state.cache.table.granule_of, state.cache.table.is_low, strict=True)
        kept = {int(granule): bool(is_low) for granule, is_low in slots if granule >= 0}
        assert all(is_low == (held | low)[granule] for granule, is_low in kept.items())
        held = kept
    assert low_fetches[1.0] == 0 < min(low_fetches[0.5], low_fetches[-1.0], refetches)


def test_two_ranks_weigh_the_choices_of_all():
    """A token's larger choice on one rank makes its smaller one on the other unimportant."""
    cfg = OffloadConfig(num_slots=4, importance_threshold=0.5)
    two = in_two_precisions(to_host(experts(), make_mesh(expert=2)), "int4")
    idx = np.array([[0, 5, 1], [6, 2, 5], [E, E, E], [E, E, E]])
    weights = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0, 0, 0], [0, 0, 0]], np.float32)
    low = np.zeros((L, E), bool)
    low[1, [1, 2, 6]] = True  # 5 is important to the second token
    x = np.linspace(-1, 1, 4 * D, dtype=np.float32).reshape(4, D)

    def serve(two, x, routing):
        state = init_state(two.full, cfg)
        state = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "expert", to="varying"), state)
        y, _, counts = offloaded(two, cfg, axis="expert")(x, routing, None, jnp.int32(1), state)
        return y, counts

    specs = EXPERT_SPEC, P(), P()
    run = jax.shard_map(serve, mesh=make_mesh(expert=2), in_specs=specs, out_specs=P())
    y, counts = jax.jit(run)(two, x, routing_of(idx, weights))
    assert (int(counts.demand_fetches), int(counts.low_fetches)) == (5, 3)
    assert_close(y, resident(mixed(low), x, routing_of(idx, weights), jnp.int32(1)))


def test_what_does_not_fit_is_refused():
    store = to_host(experts(), make_mesh())
    two, lossy = (
        in_two_precisions(store, "int8"),
        OffloadConfig(num_slots=4, importance_threshold=0),
    )
    cases = {
        "importance_threshold=0 wants serve='fetch' .* not serve='host'": lambda: OffloadConfig(
            num_slots=4, serve="host", importance_threshold=0
        ),
        "and column_parts=2": lambda: OffloadConfig(
            num_slots=4, column_parts=2, importance_threshold=0
        ),
        "=nan is not finite": lambda: OffloadConfig(num_slots=4, importance_threshold=np.nan),
        "=0, but the experts are not in two precisions$": lambda: offloaded(store, lossy),
        "=None, but the experts are in two": lambda: offloaded(two, OffloadConfig(num_slots=4)),
        "want full ones, not quantised ones": lambda: in_two_precisions(two.low, "int4"),
        "expert format 'int2' is not one of": lambda: in_two_precisions(store, "int2"),
    }
    for message, make in cases.items():
        with pytest.raises(InputError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
    assert isinstance(two, TwoPrecisions) and two.full is store
