"""Features are the same numbers from a recording and inside a jitted decoding step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.predictors import features
from moejax.predictors.features import NUM_RECENT, Recording
from tests.predictors import synthetic
from tests.predictors.synthetic import E, K, L


@pytest.fixture
def recording() -> Recording:
    """Ragged sequences: the last one ends after 3 tokens, and one token is padding in between."""
    recording = synthetic.chained_choices(np.random.default_rng(0), batch=3, length=7)
    idx = recording.topk_idx.copy()
    idx[:, 2, 3:] = E
    return synthetic.from_choices(idx, np.random.default_rng(1))


def start(recording: Recording) -> jax.Array:
    return jnp.asarray(features.popularity(recording.topk_idx, E))


@jax.jit
def decode_step(state, token, topk_idx):
    """One token through a scan over layers, as the decoder runs it; topk_idx [L, B, K]."""

    def layer_body(state, step):
        layer, chosen = step
        state = features.observe(state, layer, chosen)
        return state, features.current_features(state, layer)

    state = features.begin_token(state, token)
    return jax.lax.scan(layer_body, state, (jnp.arange(L), topk_idx))


def test_decoding_sees_the_recorded_features(recording):
    recorded = features.recorded_features(recording, start(recording))
    batch, length = recording.tokens.shape
    state = features.init_history_state(start(recording), batch, K)
    for position in range(length):
        tokens, idx = recording.tokens[:, position], recording.topk_idx[:, :, position]
        state, now = decode_step(state, tokens, idx)
        rows = np.arange(batch) * length + position
        for name in ("token", "recent", "ema"):
            want = np.asarray(getattr(recorded, name))[:, rows]
            np.testing.assert_array_equal(np.asarray(getattr(now, name))[:-1], want, name)


def test_prompt_equals_token_by_token(recording):
    batch, length = recording.tokens.shape
    whole = features.init_history_state(start(recording), batch, K)
    by_token = whole
    whole = jax.jit(features.observe_prompt)(whole, recording.topk_idx)
    for position in range(length):
        by_token, _ = decode_step(
            by_token, recording.tokens[:, position], recording.topk_idx[:, :, position]
        )
    np.testing.assert_array_equal(np.asarray(whole.ema), np.asarray(by_token.ema))


def test_ema_is_the_decayed_sum_of_earlier_tokens_of_the_sequence(recording):
    initial = np.asarray(start(recording))
    recorded = features.recorded_features(recording, start(recording))
    length, layer, sequence, position = recording.tokens.shape[1], 1, 1, 5
    want = initial[layer + 1].astype(np.float64)
    for chosen in recording.topk_idx[layer + 1, sequence, :position]:
        want = 0.9 * want
        want[chosen] += 0.1
    got = np.asarray(recorded.ema)[layer, sequence * length + position]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    first = np.asarray(recorded.ema)[layer, sequence * length]
    np.testing.assert_array_equal(first, initial[layer + 1])


def test_recent_choices_go_back_layer_by_layer(recording):
    recorded = features.recorded_features(recording, start(recording))
    recent = np.asarray(recorded.recent).reshape(L - 1, *recording.tokens.shape, NUM_RECENT, K)
    for layer in range(L - 1):
        for back in range(NUM_RECENT):
            want = recording.topk_idx[layer - back] if back <= layer else E
            np.testing.assert_array_equal(
                recent[layer, :, :, back], np.broadcast_to(want, recording.topk_idx[0].shape)
            )


def test_padding_changes_no_average(recording):
    state = features.init_history_state(start(recording), 3, K)
    padded = jnp.full((3, K), E, jnp.int32)
    moved = features.observe(state, jnp.int32(1), padded)
    np.testing.assert_array_equal(np.asarray(moved.ema), np.asarray(state.ema))


def test_popularity_counts_real_tokens_only(recording):
    share = features.popularity(recording.topk_idx, E)
    np.testing.assert_allclose(share.sum(1), K, rtol=1e-6)
    count = (recording.topk_idx[2] == 5).sum()
    assert share[2, 5] == np.float32(count / 17)  # 7 + 7 + 3 tokens


def test_parts_that_do_not_fit_are_refused(recording):
    with pytest.raises(InputError, match=r"tokens are \(2, 7\), topk_idx is \(4, 3, 7, 2\)"):
        Recording(
            tokens=recording.tokens[:2],
            topk_idx=recording.topk_idx,
            topk_weights=recording.topk_weights,
        )
    with pytest.raises(InputError, match="L >= 2"):
        Recording(
            tokens=recording.tokens,
            topk_idx=recording.topk_idx[:1],
            topk_weights=recording.topk_weights[:1],
        )
    with pytest.raises(InputError, match="none"):
        _ = recording.activations
