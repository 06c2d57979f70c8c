import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.routing_trace import from_recorded
from moejax.simulator.calls import calls_of_trace
from moejax.simulator.reference import replay_reference
from moejax.simulator.replay import replay
from moejax.simulator.summary import hit_rate_by_slots, layer_hit_rate, summarize


def make_trace(layers=2, tokens=60, experts=16, top_k=2, **kwargs):
    rng = np.random.default_rng(3)
    scores = rng.gumbel(size=(layers, tokens, experts)) + np.linspace(0, 2, experts)
    idx = np.argsort(-scores, axis=-1)[..., :top_k]
    return from_recorded(idx, num_experts=experts, expert_bytes=100, **kwargs)


def test_decode_and_prefill_add_up():
    trace = make_trace(prompt_lengths=[20])
    calls = calls_of_trace(trace)
    outcome = replay(calls, "lru", 1200)
    total, decode = summarize(calls, outcome), summarize(calls, outcome, decode_only=True)
    assert decode.lookups == 2 * 40 * 2
    assert total.lookups - decode.lookups == sum(
        len(np.unique(trace.topk_idx[layer, :20])) for layer in range(2)
    )
    assert total.bytes_loaded == 100 * (total.lookups - total.hits)
    assert total.evictions == total.lookups - total.hits - outcome.resident_bytes[-1] // 100
    assert 0 < decode.hit_rate < 1
    assert decode.calls_over_budget == 0 < total.calls_over_budget
    layers = layer_hit_rate(calls, outcome, decode_only=True)
    assert layers.mean() == pytest.approx(decode.hit_rate)


def test_no_lookups_have_no_hit_rate():
    trace = make_trace(tokens=4, prompt_lengths=[4])
    calls = calls_of_trace(trace)
    outcome = replay(calls, "lru", 1000)
    assert np.isnan(summarize(calls, outcome, decode_only=True).hit_rate)
    assert np.isnan(layer_hit_rate(calls, outcome, decode_only=True)).all()
    with pytest.raises(InputError, match="no decode step"):
        hit_rate_by_slots(trace, [4])


def test_hit_rate_by_slots():
    trace = make_trace()
    slots = [2, 4, 8, 12, 16]
    rates = hit_rate_by_slots(trace, slots)
    assert list(rates) == ["lru", "lfu", "belady"]
    for policy in rates:
        assert rates[policy] == sorted(rates[policy])
        assert all(a <= b for a, b in zip(rates[policy], rates["belady"], strict=True))
    # With a slot for every expert only first uses miss, whatever the policy.
    first_uses = sum(len(np.unique(trace.topk_idx[layer])) for layer in range(2))
    assert {round(rates[policy][-1] * 240) for policy in rates} == {240 - first_uses}


def test_slots_are_a_budget_per_layer():
    trace = make_trace()
    lookups = trace.num_layers * trace.num_tokens * trace.top_k
    for name, policy in {"lru": "layer", "lfu": "layerlfu"}.items():
        for slots in (2, 5, 9):
            per_call = replay_reference(trace, policy, slots * 100 * 2, clock="call")
            misses = sum(misses for misses, _ in per_call)
            [rate] = hit_rate_by_slots(trace, [slots], [name])[name]
            assert round(rate * lookups) == lookups - misses


def test_belady_inside_a_layer_is_the_best_possible():
    """Against the optimum by exhaustive search over what stays after every call."""
    trace = make_trace(layers=1, tokens=9, experts=5, top_k=1)
    wanted = trace.topk_idx[0, :, 0].tolist()
    for slots in (1, 2, 3):
        states = {frozenset(): 0}
        for expert in wanted:
            after: dict = {}
            for state, misses in states.items():
                misses += expert not in state
                full = state | {expert}
                keep = [full] if len(full) <= slots else [full - {e} for e in state]
                for kept in keep:
                    if expert in kept:
                        after[kept] = min(misses, after.get(kept, misses))
            states = after
        [rate] = hit_rate_by_slots(trace, [slots], ["belady"])["belady"]
        assert round(rate * len(wanted)) == len(wanted) - min(states.values())
