"""Scorers inside a jitted scan over layers give what the predictors give on a recording."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.structs import Routing
from moejax.predictors import features, history, next_gate, residual, scorers
from tests.predictors import synthetic
from tests.predictors.synthetic import CFG, D, E, L, V


@pytest.fixture(scope="module")
def stream():
    return synthetic.rotated_stream(np.random.default_rng(0), batch=3, length=4)


def routing_of(recording, layer, position) -> Routing:
    return Routing(
        topk_idx=jnp.asarray(recording.topk_idx[layer, :, position]),
        topk_weights=jnp.asarray(recording.topk_weights[layer, :, position]),
        router_logits=jnp.zeros((recording.tokens.shape[0], E)),
    )


def decode(make_scorer, arguments, recording, position, state):
    """Scores [L, B, E] of one token; the scorer is made inside jit, over traced parameters."""

    @jax.jit
    def step(arguments, state, token, hidden, routings):
        scorer = make_scorer(*arguments)

        def body(state, layer_step):
            layer, x, routing = layer_step
            scores, state = scorer(x, routing, layer, state)
            return state, scores

        state = scorers.begin_token(state, token)
        return jax.lax.scan(body, state, (jnp.arange(L), hidden, routings))

    routings = [routing_of(recording, layer, position) for layer in range(L)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings)
    token = jnp.asarray(recording.tokens[:, position])
    return step(arguments, state, token, recording.hidden[:, :, position], stacked)


def noisy(init, *args, **sizes):
    """A predictor's parameters with noise in every leaf, so that no part of it is silent."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), *args, **sizes))
    return jax.tree.map(lambda p: 0.3 * rng.normal(size=p.shape).astype(p.dtype), shapes)


def test_look_ahead_scorers_keep_no_state(stream):
    recording, routers = stream
    params = noisy(residual.init_residual, num_layers=L, d_model=D, num_experts=E, hidden=8)
    for make, arguments, want in [
        (
            partial(scorers.next_gate_scorer, cfg=CFG),
            (routers,),
            lambda layer, x: next_gate.scores(routers, layer, x, CFG),
        ),
        (
            partial(scorers.residual_scorer, cfg=CFG),
            (params, routers),
            lambda layer, x: residual.scores(params, layer, x, routers, CFG),
        ),
    ]:
        state, scores = decode(make, arguments, recording, 2, None)
        assert state is None
        assert scores.shape == (L, 3, E) and scores.dtype == jnp.float32
        for layer in range(L - 1):
            x = jnp.asarray(recording.hidden[layer, :, 2])
            np.testing.assert_allclose(scores[layer], want(layer, x), rtol=1e-5, atol=1e-5)


def test_history_scorer_follows_the_sequences(stream):
    recording, _ = stream
    share = jnp.asarray(features.popularity(recording.topk_idx, E))
    params = noisy(history.init_history, share, vocab_size=V, embedding=4, hidden=8)
    params = params.replace(popularity=share)
    recorded = features.recorded_features(recording, share, vocab_size=V)
    want = jax.jit(history.scores)(params, recorded)
    batch, length = recording.tokens.shape
    state = history.init_state(params, batch)
    for position in range(length):
        state, scores = decode(scorers.history_scorer, (params,), recording, position, state)
        rows = np.arange(batch) * length + position
        np.testing.assert_allclose(scores[:-1], want[:, rows], rtol=1e-5, atol=1e-5)


def test_history_scorer_refuses_prefill(stream):
    recording, _ = stream
    share = jnp.asarray(features.popularity(recording.topk_idx, E))
    params = noisy(history.init_history, share, vocab_size=V, embedding=4, hidden=8)
    state = history.init_state(params.replace(popularity=share), 1)
    with pytest.raises(InputError, match="1 sequences, got 3 rows"):
        decode(scorers.history_scorer, (params,), recording, 0, state)
