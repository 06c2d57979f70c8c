"""Routing path: what decoding remembers is what a recording shows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.predictors import path, scorers
from tests.predictors import synthetic
from tests.predictors.synthetic import E, L, V
from tests.predictors.test_scorers import decode, noisy, routing_of

CONTEXT = 3


@pytest.fixture(scope="module")
def params():
    sizes = dict(num_layers=L, num_experts=E, vocab_size=V, embedding=4, hidden=6)
    return noisy(partial(path.init_path, context=CONTEXT, filters=2, **sizes))


def test_recorded_windows_hold_the_newest_first():
    windows = path.recorded_windows(np.array([[5, 6, 7, 8]]), CONTEXT)
    want = [[5, -1, -1], [6, 5, -1], [7, 6, 5], [8, 7, 6]]
    np.testing.assert_array_equal(windows, [want])


def test_scorer_follows_the_sequences(params):
    stream, _ = synthetic.rotated_stream(np.random.default_rng(0), batch=3, length=4)
    windows = path.recorded_windows(stream.tokens, CONTEXT)
    want = jax.jit(path.scores)(params, windows.reshape(-1, CONTEXT)).reshape(L, 3, 4, E)
    state = path.init_path_state(params, 3)
    for position in range(4):
        state, scores = decode(scorers.path_scorer, (params,), stream, position, state)
        # Entry l is asked in layer l and is for layer l + 1.
        np.testing.assert_allclose(scores[:-1], want[1:, :, position], rtol=1e-5, atol=1e-5)
    alone, routing = path.init_path_state(params, 1), routing_of(stream, 0, 0)
    with pytest.raises(InputError, match="the path scorer wants one token of each of 1 sequences"):
        scorers.path_scorer(params)(stream.hidden[0, :, 0], routing, jnp.int32(0), alone)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_prompt_is_the_same_as_its_tokens_one_by_one(params, length):
    rng = np.random.default_rng(length)
    tokens = rng.integers(0, V, (2, 5)).astype(np.int32)
    start = path.begin_token(path.init_path_state(params, 2), jnp.array([9, 8]))
    mask = np.arange(5)[None] < np.array([[length], [max(1, length - 1)]])
    got = path.observe_prompt(start, jnp.asarray(tokens), jnp.asarray(mask))
    for row in range(2):
        want = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], start)
        for token in tokens[row, mask[row]]:
            want = path.begin_token(want, jnp.array([token]))
        np.testing.assert_array_equal(got.window[row], want.window[0])


def test_an_unknown_past_adds_nothing(params):
    longer = jnp.array([[4, path.NO_TOKEN, path.NO_TOKEN]])
    embedded = params.encoder.embedding[4]
    x = jnp.concatenate([embedded[None], params.encoder.filters[:, 0] * embedded[None]]).ravel()
    h = jax.nn.gelu(x @ params.encoder.w_in + params.encoder.b_in)
    h = h + jax.nn.gelu(h @ params.encoder.w_block + params.encoder.b_block)
    np.testing.assert_allclose(path.encode(params.encoder, longer)[0], h, rtol=1e-5, atol=1e-6)
