"""Bounds against hand-computed values and a replay of DeepSeek-V2-Lite's routing.

The replay: 26 layers, top-6 of 64, experts of 17.3 MB in bfloat16, 0.12 ms of attention and 0.06 ms
of experts per layer, least-recently-used slots per layer, one link (discrete-event simulation).
"""

import math

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.costmodel import offload_bounds as bounds

LAYERS, EXPERTS, TOP_K = 26, 64, 6
EXPERT_BYTES = 17.3e6
DEVICE_S = LAYERS * 0.18e-3
LRU_16, LRU_32 = 0.463, 0.710  # measured hit rates of 16 and 32 slots per layer


@pytest.mark.parametrize(
    "tokens, measured", [(1, 6.0), (2, 11.3), (4, 20.6), (8, 33.9), (16, 49.0)]
)
def test_distinct_experts_against_measurement(tokens, measured):
    predicted = bounds.distinct_experts(tokens, EXPERTS, TOP_K)
    assert predicted == pytest.approx(measured, rel=0.04)
    assert predicted >= measured - 1e-9


def test_distinct_experts_by_hand():
    assert bounds.distinct_experts(0, 8, 2) == 0
    assert bounds.distinct_experts(1, 8, 2) == pytest.approx(2)
    assert bounds.distinct_experts(2, 8, 2) == pytest.approx(3.5)  # 8 (1 - 9/16)
    assert bounds.distinct_experts(3, 4, 4) == 4


def test_distinct_experts_refuses_nonsense():
    with pytest.raises(InputError, match="top_k=9, expected 1 to num_experts=8"):
        bounds.distinct_experts(1, 8, 9)
    with pytest.raises(InputError, match="tokens=-1"):
        bounds.distinct_experts(-1, 8, 2)


def test_device_floor_takes_the_slower_side_of_each_layer():
    floor = bounds.device_floor_s(
        read_bytes=np.array([100.0, 10.0]),
        flops=np.array([5.0, 60.0]),
        memory_bytes_per_s=50.0,
        flops_per_s=10.0,
    )
    assert floor == pytest.approx(2.0 + 6.0)
    equal = bounds.device_floor_s(
        read_bytes=100.0, flops=5.0, memory_bytes_per_s=50.0, flops_per_s=10.0, num_layers=3
    )
    assert equal == pytest.approx(6.0)


@pytest.mark.parametrize(
    "link, hit_rate, demand_ms, oracle_ms",
    [(12e9, LRU_16, 129, 125), (25e9, LRU_16, 64.5, 59.9), (25e9, LRU_32, 36.8, 33.0)],
)
def test_link_bounds_bracket_the_replay(link, hit_rate, demand_ms, oracle_ms):
    misses = bounds.missing_experts(bounds.distinct_experts(1, EXPERTS, TOP_K), hit_rate)
    busy = bounds.link_s(LAYERS, misses, bounds.transfer_s(EXPERT_BYTES, link))
    bound = bounds.overlapped_bound_s(DEVICE_S, busy)
    assert bound <= oracle_ms * 1e-3
    assert bound == pytest.approx(oracle_ms * 1e-3, rel=0.06)
    assert bounds.serial_s(DEVICE_S, busy) == pytest.approx(demand_ms * 1e-3, rel=0.04)


def test_overlap_gains_at_most_a_factor_of_two():
    assert bounds.overlap_speedup(3.0, 3.0) == 2.0
    assert bounds.overlap_speedup(1.0, 4.0) == 1.25
    assert bounds.overlap_speedup(4.0, 1.0) == 1.25
    assert bounds.overlap_speedup(0.0, 0.0) == 1.0
    for device, link in ((1.0, 7.0), (5.0, 2.0)):
        serial, bound = bounds.serial_s(device, link), bounds.overlapped_bound_s(device, link)
        assert bounds.overlap_speedup(device, link) == pytest.approx(serial / bound)


def test_host_expert_is_bound_by_bytes_then_by_arithmetic():
    rates = dict(host_bytes_per_s=100e9, host_flops_per_s=1e12)
    seconds = bounds.host_expert_s(EXPERT_BYTES, EXPERT_BYTES / 2, np.array([1, 100]), **rates)
    np.testing.assert_allclose(seconds, [0.173e-3, 1.73e-3])


def test_link_and_host_end_together():
    tau, host, misses = 0.6, 0.2, 8.0
    loaded = misses * bounds.loaded_share(tau, host)
    assert loaded == pytest.approx(2.0)
    assert loaded * tau == pytest.approx((misses - loaded) * host)
    assert bounds.loaded_share(tau, math.inf) == 1.0
    assert bounds.loaded_share(tau, 0.0) == 0.0


def test_shared_bound_adds_the_bandwidths_when_bytes_are_equal():
    link, cpu, misses = 25e9, 100e9, 3.2
    tau, host = EXPERT_BYTES / link, EXPERT_BYTES / cpu
    busy = bounds.link_s(LAYERS, misses, tau)
    bound = bounds.shared_bound_s(0.0, busy, tau_s=tau, host_s=host)
    assert bound == pytest.approx(LAYERS * misses * EXPERT_BYTES / (link + cpu))
    assert bounds.shared_bound_s(1.0, busy, tau_s=tau, host_s=host) == 1.0
    dram = bounds.shared_bound_s(
        0.0, busy, tau_s=tau, host_s=host, dram_bytes=1e9, dram_bytes_per_s=50e9
    )
    assert dram == pytest.approx(20e-3)


def test_do_no_harm_on_pcie4():
    rule = dict(tau_s=0.69e-3, window_s=0.18e-3)
    assert rule["window_s"] / rule["tau_s"] == pytest.approx(0.26, abs=0.001)
    least = bounds.least_recall(6, TOP_K, 0.46, **rule)
    assert least == pytest.approx(0.92, abs=0.005)
    for recall, helps in ((0.79, False), (0.93, True)):  # the replay: .79 loses, .93 wins
        wasted = bounds.wasted_loads(6, recall, TOP_K, 0.46)
        assert bounds.prefetch_helps(wasted, **rule) is helps
    assert bounds.wasted_loads(6, 0.79, TOP_K, 0.46) == pytest.approx(6 * 0.21 * 0.54)


def test_least_recall_is_where_prefetching_turns():
    rule = dict(tau_s=1e-3, window_s=0.5e-3)
    least = bounds.least_recall(8, TOP_K, 0.5, **rule)
    assert bounds.wasted_loads(8, least, TOP_K, 0.5) == pytest.approx(0.5)
    assert bounds.least_recall(8, TOP_K, 0.0, tau_s=1.0, window_s=0.1) > 1  # hopeless
    assert bounds.least_recall(1, TOP_K, 0.0, tau_s=1.0, window_s=5.0) == 0.0  # harmless


def test_prefetch_saving_and_cost():
    assert bounds.prefetch_saving_s(10, 0.5, 4.0, 1e-3, 1.5e-3) == pytest.approx(15e-3)
    assert bounds.prefetch_saving_s(10, 0.5, 2.0, 1e-3, 1.5e-3) == pytest.approx(10e-3)
    assert bounds.prefetch_cost_s(10, 0.3, 1e-3) == pytest.approx(3e-3)


def test_speculation_breaks_even_at_the_sharing_of_the_window():
    # Eight consecutive tokens of DeepSeek-V2-Lite want 28.2 distinct experts per layer.
    assert bounds.speculation_break_even(28.2, TOP_K) == pytest.approx(4.7)
    plain = bounds.speculative_bytes_per_token(LAYERS, 0.5, TOP_K, EXPERT_BYTES, 1)
    even = bounds.speculative_bytes_per_token(LAYERS, 0.5, 28.2, EXPERT_BYTES, 4.7)
    assert even == pytest.approx(plain)


def test_lru_guard():
    assert not bounds.lru_can_hit(LAYERS * TOP_K - 1, LAYERS, TOP_K)
    assert bounds.lru_can_hit(LAYERS * TOP_K, LAYERS, TOP_K)


def test_lru_guard_is_what_a_cyclic_trace_does():
    """A pool one slot short of a token's experts never hits when tokens repeat themselves."""
    layers, top_k = 3, 2
    token = [(layer, expert) for layer in range(layers) for expert in range(top_k)]
    for slots in range(1, layers * top_k + 2):
        cache, hits = [], 0
        for granule in token * 5:
            hits += granule in cache
            cache = ([g for g in cache if g != granule] + [granule])[-slots:]
        assert (hits > 0) == bounds.lru_can_hit(slots, layers, top_k)


def test_achieved_fraction():
    assert bounds.achieved_fraction(2.0, 8.0) == 0.25
