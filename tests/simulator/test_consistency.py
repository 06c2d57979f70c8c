"""The measures together, and on the recorded runs."""

import pytest

from experiments.traces import open_trace
from moejax.core.errors import InputError
from moejax.simulator.consistency import entries, measure_consistency
from tests.simulator.test_ranks import slow_hits
from tests.simulator.test_segments import slow_srp
from tests.simulator.test_stack import random_trace


def test_short_sequences_are_left_out_and_counted():
    trace = random_trace(7, lengths=(12, 5, 9), skip=0)
    got = measure_consistency(trace, [4, 9])
    assert got.excluded == {4: 0, 9: 1}
    hits = lookups = 0
    for start, stop in ((0, 12), (17, 26)):
        for layer in range(2):
            tokens = trace.topk_idx[layer, start:stop].tolist()
            tokens = [[e for e in token if e < 7] for token in tokens]
            hits += slow_hits(tokens, 6, "sch", 9)
            lookups += sum(map(len, tokens))
    assert got.sch[9][6] == pytest.approx(hits / lookups, abs=1e-6)
    with pytest.raises(InputError, match="window=13: all 3 sequences are shorter"):
        measure_consistency(trace, [4, 13])


def test_of_a_recorded_run_equals_slow_counting():
    trace, _ = open_trace("gptoss")
    got = measure_consistency(trace, [4])
    assert got.segments[4].layer_srp[0] == pytest.approx(slow_srp(trace, 4, [0])[0], abs=1e-6)
    size, lookups, hits = entries(3, trace.top_k, 128), 0, {"lru": 0, "belady": 0}
    for layer in range(trace.num_layers):
        tokens = [[e for e in token if e < 128] for token in trace.topk_idx[layer].tolist()]
        tokens = [token for token in tokens if token]
        lookups += sum(map(len, tokens))
        for kind in hits:
            hits[kind] += slow_hits(tokens, size, kind)
    assert got.lru[6] == pytest.approx(hits["lru"] / lookups, abs=1e-6)
    assert got.belady[6] == pytest.approx(hits["belady"] / lookups, abs=1e-6)


def test_entries_of_a_cache():
    assert [entries(rho, 6, 64) for rho in (0.5, 1, 2.5, 99)] == [3, 6, 15, 64]
    with pytest.raises(InputError, match="rho=0.1 of top_k=6 experts is no entry"):
        entries(0.1, 6, 64)
