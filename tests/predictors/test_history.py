"""The history predictor starts as popularity, reads nothing of the model, and decodes the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.predictors import features, history
from tests.predictors import synthetic
from tests.predictors.synthetic import E, L, V

SCORES = jax.jit(history.scores, static_argnames="horizon")


@pytest.fixture(scope="module")
def recording():
    return synthetic.chained_choices(np.random.default_rng(0), batch=2, length=4)


def init(recording, **sizes) -> history.HistoryParams:
    share = jnp.asarray(features.popularity(recording.topk_idx, E))
    sizes = dict(vocab_size=V, embedding=8, hidden=16, horizons=2) | sizes
    return history.init_history(jax.random.key(0), share, **sizes)


def noisy(recording) -> history.HistoryParams:
    """Noise in every leaf, so that no part is silent."""
    params, rng = init(recording), np.random.default_rng(0)
    net = jax.tree.map(
        lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape).astype(np.float32)), params.net
    )
    return params.replace(net=net)


def recorded(recording, params):
    return features.recorded_features(recording, params.popularity, vocab_size=V)


def test_unfitted_is_popularity(recording):
    params = init(recording)
    for horizon in (1, 2):
        got = jax.nn.sigmoid(SCORES(params, recorded(recording, params), horizon=horizon))
        want = np.clip(np.asarray(params.popularity)[horizon:, None], 1e-4, 1 - 1e-4)
        assert got.shape == (L - horizon, 8, E)
        np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=1e-4, atol=1e-6)


def test_scores_depend_on_token_choices_and_averages(recording):
    params = noisy(recording)
    known = recorded(recording, params)
    base = np.asarray(SCORES(params, known))
    for name, other in {
        "token": (known.token + 1) % V,
        "chosen": (known.chosen + 1) % E,
        "ema": known.ema[:, ::-1],
    }.items():
        changed = np.asarray(SCORES(params, known.replace(**{name: other})))
        assert np.abs(changed - base).max() > 0.01, name


@pytest.mark.parametrize("horizon", [1, 2])
def test_no_layer_reads_choices_of_its_own_or_later_layers(recording, horizon):
    params = noisy(recording)
    known = recorded(recording, params)
    base = np.asarray(SCORES(params, known, horizon=horizon))
    for layer in range(L):
        moved = known.chosen.at[layer].set((known.chosen[layer] + 1) % E)
        got = np.asarray(SCORES(params, known.replace(chosen=moved), horizon=horizon))
        same = [np.array_equal(a, b) for a, b in zip(got, base, strict=True)]
        assert same == [target - horizon < layer for target in range(horizon, L)]


def test_decoding_scores_what_the_recording_scores(recording):
    params, horizon = noisy(recording), 2
    want = SCORES(params, recorded(recording, params), horizon=horizon)

    @partial(jax.jit, static_argnames="horizon")
    def step(params, state, token, topk_idx, horizon):
        def body(state, layer_step):
            state = history.follow(params, state, *layer_step)
            return state, history.ask(params, state, layer_step[0], horizon=horizon)

        state = features.begin_token(state, token)
        return jax.lax.scan(body, state, (jnp.arange(L), topk_idx))

    batch, length = recording.tokens.shape
    state = history.init_state(params, batch)
    for position in range(length):
        tokens, idx = recording.tokens[:, position], recording.topk_idx[:, :, position]
        state, got = step(params, state, tokens, idx, horizon)
        rows = np.arange(batch) * length + position
        np.testing.assert_allclose(got[:-horizon], want[:, rows], rtol=1e-5, atol=1e-5)


def test_wrong_horizon_is_refused(recording):
    with pytest.raises(InputError, match=r"horizons=4 is not in \[1, 4\) layers"):
        init(recording, horizons=4)
