"""Caches of every size at once against one cache after another."""

import numpy as np
import pytest

from moejax.data.routing_trace import from_recorded
from moejax.simulator.ranks import lru
from moejax.simulator.stack import caches_of_trace, hits_by_size, too_short


def random_trace(seed=0, layers=2, experts=7, top_k=3, lengths=(12, 5, 9), skip=3):
    """Skewed routing; the last layer never saw the first `skip` tokens."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(layers, sum(lengths), experts)) + np.linspace(0, 2, experts)
    idx = np.argsort(-scores, axis=-1)[..., :top_k]
    idx[-1, :skip] = experts
    idx[0, 1, 2] = experts  # one choice of a token is absent
    return from_recorded(idx, num_experts=experts, expert_bytes=8, sequence_lengths=lengths)


def test_caches_hold_what_each_layer_saw_longest_first():
    trace = random_trace()
    chosen = caches_of_trace(trace)
    assert chosen.shape == (6, 12, 3)
    assert np.sum((chosen < 7).any(-1), axis=1).tolist() == [12, 9, 9, 9, 5, 5]
    np.testing.assert_array_equal(chosen[0], trace.topk_idx[0, :12])
    np.testing.assert_array_equal(chosen[1, :9], trace.topk_idx[1, 3:12])
    assert len(caches_of_trace(trace, 9)) == 4 and too_short(trace, 9) == 1
    assert too_short(trace, 10) == 3  # the first is too short in its last layer


def test_smaller_caches_lie_within_larger_ones_and_everything_hits_but_first_uses():
    trace = random_trace(1)
    chosen = caches_of_trace(trace)
    hits = hits_by_size(chosen, 7, lru(chosen, 7))
    assert hits[0] == 0 and (np.diff(hits) >= 0).all()
    first_uses = sum(len(set(row[row < 7].tolist())) for row in chosen)
    assert hits[-1] == np.sum(chosen < 7) - first_uses


@pytest.mark.parametrize("size", [1, 2, 4])
def test_lru_of_single_choices_is_a_list(size):
    chosen = np.random.default_rng(2).integers(0, 5, (1, 40, 1)).astype(np.int32)
    recent, hits = [], 0
    for expert in chosen[0, :, 0].tolist():
        hits += expert in recent[:size]
        recent = [expert, *[e for e in recent if e != expert]]
    assert hits_by_size(chosen, 5, lru(chosen, 5))[size] == hits
