import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.routing_trace import from_recorded
from moejax.simulator.workload import count_tokens, lanes_of_trace, make_workload
from tests.simulator.test_stack import random_trace

FACTS = {"dense_bytes": 1e6, "bits_per_weight": 16.0, "seed": 0}


def test_sequences_go_to_the_shortest_lane():
    trace = random_trace(lengths=(12, 5, 9), skip=0)
    lanes = lanes_of_trace(trace, 2)
    assert lanes.chosen.shape == (2, 12, 2, 3) and not lanes.is_cut
    np.testing.assert_array_equal(lanes.chosen[:, :, 0], trace.topk_idx[:, :12])
    np.testing.assert_array_equal(lanes.chosen[:, :, 1], trace.topk_idx[:, 12:24])
    assert lanes_of_trace(trace, 2, max_steps=5).chosen.shape[1] == 5


def test_a_trace_of_few_sequences_is_cut_and_says_so():
    trace = random_trace(lengths=(13,), skip=0)
    lanes = lanes_of_trace(trace, 4)
    assert lanes.is_cut and lanes.chosen.shape == (2, 3, 4, 3)
    np.testing.assert_array_equal(lanes.chosen[:, 1, 2], trace.topk_idx[:, 7])
    with pytest.raises(InputError, match="13 tokens in 1 sequences has 1 steps of batch=8, want 2"):
        lanes_of_trace(trace, 8)


def test_tokens_of_experts_equal_a_loop():
    lanes = lanes_of_trace(random_trace(lengths=(12, 11)), 2)
    counts = count_tokens(lanes.chosen, 7)
    for layer, step, expert in np.ndindex(2, 11, 7):
        assert counts[step, layer, expert] == np.sum(lanes.chosen[layer, step] == expert)


def test_predictions_have_the_stated_recall_and_near_misses_are_frequent_experts():
    rng = np.random.default_rng(0)
    scores = rng.gumbel(size=(2, 800, 16)) + np.repeat([0.0, 2.0], 8)
    idx = np.argsort(-scores, axis=-1)[..., :2]
    lanes = lanes_of_trace(from_recorded(idx, num_experts=16, expert_bytes=8), 1)
    halves = (slice(0, 400), slice(400, 800))
    work = make_workload(lanes, *halves, recall=0.7, **FACTS)
    assert (work.predicted.sum(-1) == 2).all() and work.past.sum() == 2 * 2 * 400
    right = np.minimum(work.predicted, work.tokens).sum() / work.tokens.sum()
    assert right == pytest.approx(0.7, abs=0.04)
    wrong = np.maximum(work.predicted - work.tokens, 0).sum((0, 1))
    assert wrong[8:].sum() > 2 * wrong[:8].sum()  # uniform draws would favour neither
    again = make_workload(lanes, *halves, recall=0.7, **FACTS)
    np.testing.assert_array_equal(again.predicted, work.predicted)
    perfect = make_workload(lanes, *halves, recall=1.0, **FACTS)
    np.testing.assert_array_equal(perfect.predicted, perfect.tokens)
    with pytest.raises(InputError, match="recall=1.2 is not between 0 and 1"):
        make_workload(lanes, *halves, recall=1.2, **FACTS)
