"""SRP against windows that are counted one by one."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.routing_trace import from_recorded
from moejax.simulator.segments import count_windows, segment_routing
from tests.simulator.test_stack import random_trace


def slow_srp(trace, window, layers):
    """(SRP, rho) from the definition."""
    counts = []
    for start, length in zip(trace.sequence_starts, trace.sequence_lengths, strict=True):
        for layer in layers:
            tokens = [set(row.tolist()) for row in trace.topk_idx[layer, start : start + length]]
            tokens = [token - {trace.num_experts} for token in tokens]
            tokens = [token for token in tokens if token]
            for first in range(len(tokens) - window + 1):
                for expert in range(trace.num_experts):
                    within = tokens[first : first + window]
                    counts.append(sum(expert in token for token in within))
    wanted, best = sum(counts), (0.0, 0.0)
    for threshold in range(1, window + 1):
        loaded = [c for c in counts if c >= threshold]
        f1 = 2 * sum(loaded) / (window * len(loaded) + wanted)
        best = max(best, (f1, window * len(loaded) / wanted), key=lambda pair: pair[0])
    return best


@pytest.mark.parametrize("window", [1, 4, 9])
def test_equals_the_definition(window):
    trace = random_trace(5)
    got = segment_routing(trace, window)
    np.testing.assert_allclose((got.srp, got.cache), slow_srp(trace, window, [0, 1]), atol=1e-6)
    slow = [slow_srp(trace, window, [layer])[0] for layer in (0, 1)]
    np.testing.assert_allclose(got.layer_srp, slow, atol=1e-6)


def test_the_same_experts_for_every_token_are_perfectly_consistent():
    idx = np.broadcast_to(np.array([2, 5]), (1, 10, 2))
    got = segment_routing(from_recorded(idx, num_experts=8, expert_bytes=1), 4)
    assert (got.srp, got.cache, got.threshold, got.windows) == (1.0, 1.0, 1, 7)


def test_windows_do_not_cross_sequences_and_need_a_token():
    trace = random_trace(6)
    assert count_windows(trace, 9).sum(1).tolist() == [(4 + 1) * 7, (1 + 1) * 7]
    assert np.isnan(segment_routing(trace, 13).srp)
    with pytest.raises(InputError, match="window=0 must be at least 1 token"):
        segment_routing(trace, 0)
