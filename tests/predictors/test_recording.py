"""Traces become recordings without losing a token, and splits go by sequence."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.routing_trace import from_recorded
from moejax.predictors import recording
from tests.predictors import synthetic
from tests.predictors.synthetic import E, K, L


@pytest.fixture
def trace():
    rng = np.random.default_rng(0)
    idx = rng.permuted(np.tile(np.arange(E), (L, 9, 1)), axis=-1)[..., :K]
    return from_recorded(
        idx,
        topk_weights=rng.random(idx.shape),
        num_experts=E,
        expert_bytes=1,
        sequence_lengths=[2, 4, 3],
    )


def test_a_trace_side_by_side(trace):
    made = recording.from_trace(trace)
    assert made.topk_idx.shape == (L, 3, 4, K) and made.tokens is None and made.hidden is None
    for sequence, (start, length) in enumerate([(0, 2), (2, 4), (6, 3)]):
        want = trace.topk_idx[:, start : start + length]
        np.testing.assert_array_equal(made.topk_idx[:, sequence, :length], want)
        assert (made.topk_idx[:, sequence, length:] == E).all()
        assert not made.topk_weights[:, sequence, length:].any()
    np.testing.assert_array_equal(made.topk_weights[:, 2, :3], trace.topk_weights[:, 6:])


def test_take_keeps_the_given_order():
    rotated, _ = synthetic.rotated_stream(np.random.default_rng(0), batch=3, length=2)
    some = recording.take(rotated, [2, 0])
    np.testing.assert_array_equal(some.tokens, rotated.tokens[[2, 0]])
    for name in ("topk_idx", "topk_weights", "hidden"):
        np.testing.assert_array_equal(getattr(some, name), getattr(rotated, name)[:, [2, 0]])
    with pytest.raises(InputError, match="no sequences"):
        recording.take(rotated, [])


def test_every_sequence_is_held_out_once():
    pairs = recording.folds(11, 3, seed=0)
    assert sorted(len(held_out) for _, held_out in pairs) == [3, 4, 4]
    np.testing.assert_array_equal(np.sort(np.concatenate([held for _, held in pairs])), range(11))
    for fit, held_out in pairs:
        np.testing.assert_array_equal(np.sort(np.concatenate([fit, held_out])), range(11))
    assert any((pairs[0][1] != other[0][1]).any() for other in [recording.folds(11, 3, seed=1)])
    with pytest.raises(InputError, match="folds=2 is not between 2 and sequences=1"):
        recording.folds(1, 2, seed=0)


def test_what_was_not_recorded_is_told(trace):
    made = recording.from_trace(trace)
    with pytest.raises(InputError, match="wants token ids"):
        _ = made.token_ids
    with pytest.raises(InputError, match="router weights are wanted"):
        _ = recording.Recording(topk_idx=made.topk_idx).weights
    with pytest.raises(InputError, match="wants hidden states"):
        _ = made.activations
