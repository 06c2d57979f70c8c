"""The metric suite on cases small enough to count by hand."""

import dataclasses

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.predictors import evaluate
from moejax.predictors.coverage import one_hot_sets
from tests.predictors import synthetic
from tests.predictors.synthetic import CFG, E, K, L


def two_tokens() -> tuple[np.ndarray, synthetic.Recording]:
    """One target layer, two tokens: one predicted half, the other wholly."""
    idx = np.array([[[[0, 1], [2, 3]]], [[[0, 1], [2, 3]]]])
    recording = synthetic.from_choices(idx, np.random.default_rng(0))
    weights = np.array([0.9, 0.1, 0.5, 0.5], np.float32).reshape(1, 1, 2, 2)
    recording = dataclasses.replace(recording, topk_weights=np.concatenate([weights, weights]))
    scores = np.array([[9.0, 1, 2, 3, 0, 0], [0, 0, 5, 6, 1, 2]]).reshape(1, 1, 2, 6)
    return scores, recording


def test_metrics_by_hand():
    scores, recording = two_tokens()
    got = evaluate.evaluate(scores, recording, expert_bytes=10, sizes=(2, 4), coverage_batch=1)
    assert got.recall == {2: [0.75], 4: [1.0]}
    assert got.exact_set == [0.5]
    assert got.weight_mass[2] == pytest.approx([1.9 / 2.0])
    assert got.wasted_bytes == {2: [5.0], 4: [20.0]}
    assert got.token_coverage == {1: [0.5], 3: [0.75]}  # one sequence is its own batch
    assert got.coverage_error == {1: [0.0], 3: [0.25]}
    assert got.mean_recall(2) == 0.75


def test_horizon_shifts_the_targets():
    """Layers 2 and 3 are predicted two layers ahead; only a score of the right layer is right."""
    recording = synthetic.chained_choices(np.random.default_rng(0), batch=4, length=8)
    right = one_hot_sets(recording.topk_idx[2:], E)
    got = evaluate.evaluate(right, recording, expert_bytes=1, horizon=2)
    assert got.recall[K] == [1.0] * (L - 2)
    off_by_one = one_hot_sets(recording.topk_idx[1:-1], E)
    got = evaluate.evaluate(off_by_one, recording, expert_bytes=1, horizon=2)
    assert max(got.recall[K]) < 0.5


def test_choices_without_weights_have_no_weight_mass():
    scores, recording = two_tokens()
    bare = dataclasses.replace(recording, topk_weights=None, tokens=None)
    got = evaluate.evaluate(scores, bare, expert_bytes=10, sizes=(2, 4), coverage_batch=1)
    assert got.weight_mass == {} and got.recall == {2: [0.75], 4: [1.0]}


def test_padding_counts_nowhere():
    scores, recording = two_tokens()
    idx = recording.topk_idx.copy()
    idx[:, :, 0] = 6
    padded = dataclasses.replace(recording, topk_idx=idx)
    got = evaluate.evaluate(scores, padded, expert_bytes=10, sizes=(2,), coverage_batch=1)
    assert got.recall == {2: [1.0]} and got.exact_set == [1.0]
    assert got.wasted_bytes == {2: [0.0]} and got.weight_mass == {2: [1.0]}
    assert got.token_coverage == {1: [0.5], 3: [1.0]}


def test_oracle_reads_one_and_random_reads_chance():
    rng = np.random.default_rng(0)
    recording = synthetic.chained_choices(rng, batch=16, length=64)
    oracle = evaluate.evaluate(
        one_hot_sets(recording.topk_idx[1:], E), recording, expert_bytes=7, coverage_batch=4
    )
    assert oracle.recall == {m: [1.0] * (L - 1) for m in (K, K + 2)}  # k + 2 == 2 k here
    assert oracle.exact_set == [1.0] * (L - 1)
    assert oracle.wasted_bytes[K + 2] == [14.0] * (L - 1)
    guess = rng.random((L - 1, 16, 64, E))
    random = evaluate.evaluate(guess, recording, expert_bytes=7)
    np.testing.assert_allclose(random.recall[K], K / E, atol=0.05)
    np.testing.assert_allclose(random.recall[K + 2], (K + 2) / E, atol=0.05)


def test_default_sizes_stop_at_the_experts():
    assert evaluate.default_sizes(4, 32) == (4, 6, 8)
    assert evaluate.default_sizes(4, 5) == (4, 5)


def test_wrong_sizes_and_shapes_are_refused():
    scores, recording = two_tokens()
    with pytest.raises(InputError, match=r"sizes=\(7,\).*num_experts=6"):
        evaluate.evaluate(scores, recording, expert_bytes=1, sizes=(7,))
    with pytest.raises(InputError, match=r"\(1, 1, 1, 6\)"):
        evaluate.evaluate(scores[:, :, :1], recording, expert_bytes=1)


def test_fresh_gate_control_catches_foreign_routers():
    recording, routers = synthetic.rotated_stream(np.random.default_rng(0), batch=4, length=8)
    evaluate.check_fresh_gate(recording, routers, CFG)
    shifted = dataclasses.replace(routers, w_router=np.roll(routers.w_router, 1, axis=0))
    with pytest.raises(InputError, match="fresh-gate control reads .* in MoE layer 0, not 100 %"):
        evaluate.check_fresh_gate(recording, shifted, CFG)
    hidden = recording.activations.copy()
    hidden[2, 1, 1] = hidden[2, 1, 2]
    one_wrong = dataclasses.replace(recording, hidden=hidden)
    with pytest.raises(InputError, match="in MoE layer 2"):
        evaluate.check_fresh_gate(one_wrong, routers, CFG)
