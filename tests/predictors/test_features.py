"""Features are the same numbers from a recording and inside a jitted decoding step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.predictors import features
from moejax.predictors.recording import Recording
from tests.predictors import synthetic
from tests.predictors.synthetic import E, K, L, V


@pytest.fixture
def recording() -> Recording:
    """Ragged sequences: the last one ends after 3 tokens, and one token is padding in between."""
    recording = synthetic.chained_choices(np.random.default_rng(0), batch=3, length=7)
    idx = recording.topk_idx.copy()
    idx[:, 2, 3:] = E
    return synthetic.from_choices(idx, np.random.default_rng(1))


def start(recording: Recording) -> jax.Array:
    return jnp.asarray(features.popularity(recording.topk_idx, E))


def initial_state(recording: Recording) -> features.HistoryState:
    batch = len(recording.tokens)
    return features.HistoryState(
        ema=features.initial_ema(start(recording), batch),
        latent=jnp.zeros((batch, 1)),
        token=jnp.zeros((batch,), jnp.int32),
    )


@jax.jit
def decode_step(state, token, topk_idx):
    """One token through a scan over layers, as the decoder runs it; topk_idx [L, B, K]."""

    def layer_body(state, step):
        layer, chosen = step
        before = jax.lax.dynamic_index_in_dim(state.ema, layer, keepdims=False)
        return features.observe(state, layer, chosen), before

    state = features.begin_token(state, token)
    return jax.lax.scan(layer_body, state, (jnp.arange(L), topk_idx))


def test_decoding_sees_the_recorded_features(recording):
    recorded = features.recorded_features(recording, start(recording), vocab_size=V)
    batch, length = recording.tokens.shape
    state = initial_state(recording)
    for position in range(length):
        tokens, idx = recording.tokens[:, position], recording.topk_idx[:, :, position]
        state, ema = decode_step(state, tokens, idx)
        rows = np.arange(batch) * length + position
        np.testing.assert_array_equal(np.asarray(ema), np.asarray(recorded.ema)[:, rows])
        np.testing.assert_array_equal(state.token, np.asarray(recorded.token)[0, rows])
        np.testing.assert_array_equal(idx, np.asarray(recorded.chosen)[:, rows])


def test_prompt_equals_token_by_token(recording):
    whole = by_token = initial_state(recording)
    whole = jax.jit(features.observe_prompt)(whole, recording.topk_idx)
    for position in range(recording.tokens.shape[1]):
        by_token, _ = decode_step(
            by_token, recording.tokens[:, position], recording.topk_idx[:, :, position]
        )
    np.testing.assert_array_equal(np.asarray(whole.ema), np.asarray(by_token.ema))


def test_averages_are_decayed_sums_of_earlier_tokens_of_the_sequence(recording):
    initial = np.asarray(start(recording))
    recorded = features.recorded_features(recording, start(recording), vocab_size=V)
    length, layer, sequence, position = recording.tokens.shape[1], 2, 1, 5
    for p, decay in enumerate(features.DECAYS):
        want = initial[layer].astype(np.float64)
        for chosen in recording.topk_idx[layer, sequence, :position]:
            want = decay * want
            want[chosen] += 1 - decay
        got = np.asarray(recorded.ema)[layer, sequence * length + position, p]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
        first = np.asarray(recorded.ema)[layer, sequence * length, p]
        np.testing.assert_array_equal(first, initial[layer])


def test_some_rows_are_those_rows(recording):
    every = features.recorded_features(recording, start(recording), vocab_size=V)
    rows = np.array([3, 11, 4])
    some = features.recorded_features(recording, start(recording), vocab_size=V, rows=rows)
    for name in ("token", "chosen", "ema"):
        want = np.asarray(getattr(every, name))[:, rows]
        np.testing.assert_array_equal(np.asarray(getattr(some, name)), want)


def test_without_token_ids_all_tokens_are_the_same(recording):
    bare = Recording(topk_idx=recording.topk_idx)
    assert not np.asarray(
        features.recorded_features(bare, start(recording), vocab_size=1).token
    ).any()
    with pytest.raises(InputError, match="vocab_size=11: the recording has no token ids"):
        features.recorded_features(bare, start(recording), vocab_size=V)


def test_padding_changes_no_average(recording):
    state = initial_state(recording)
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
