"""Fits find what a recording holds; losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.predictors import fit_hidden, llapor, path, pre_attention
from moejax.predictors.config import FitConfig
from moejax.predictors.llapor import LlaporConfig
from moejax.predictors.tuning import missed
from tests.predictors import synthetic
from tests.predictors.synthetic import D, E, K, L

FIT = FitConfig(horizon_steps=150, batch=256, hidden=32, embedding=8, learning_rate=2e-2)
SIZES = LlaporConfig(edge_components=D, middle_components=D, edge_hidden=32, middle_hidden=32)


@pytest.fixture(scope="module")
def stream():
    return synthetic.rotated_stream(np.random.default_rng(0), batch=64, states=1 << 16)[0]


def recalls(scores, idx):
    return 1 - np.asarray(missed(jnp.asarray(scores), jnp.asarray(idx))).mean(1)


def test_llapor_learns_a_rotation(stream):
    fit, held = synthetic.take(stream, slice(0, 48)), synthetic.take(stream, slice(48, 64))
    params, losses = fit_hidden.fit_llapor(fit, E, SIZES, FIT)
    scores = llapor.all_scores(params, held.hidden[:-1].reshape(L - 1, -1, D))
    assert (recalls(scores, held.topk_idx[1:].reshape(L - 1, -1, K)) > 0.6).all()  # chance: 0.125
    assert np.mean(losses[-10:]) < 0.6 * losses[0]


def test_pre_attention_learns_a_linear_map(stream):
    states = np.roll(stream.hidden, 1, axis=-1)
    with pytest.raises(InputError, match="states are"):
        fit_hidden.fit_pre_attention(states[1:], stream, E, FIT)
    params, _ = fit_hidden.fit_pre_attention(states, stream, E, FIT)
    idx = stream.topk_idx.reshape(L, -1, K)
    for layer in (0, L - 1):
        scores = pre_attention.scores(params, layer, states[layer].reshape(-1, D))
        assert recalls(scores[None], idx[layer][None]) > 0.6


def test_path_learns_what_tokens_decide():
    rng = np.random.default_rng(0)
    table = np.stack([rng.permutation(E)[:K] for _ in range(L * synthetic.V)])
    tokens = rng.integers(0, synthetic.V, (32, 16))
    # Layer l depends on the token l % 2 places back.
    before = np.concatenate([np.zeros((32, 1), int), tokens[:, :-1]], axis=1)
    layers = [table[layer * synthetic.V + (tokens, before)[layer % 2]] for layer in range(L)]
    recording = synthetic.from_choices(np.stack(layers), rng)
    recording = type(recording)(tokens=tokens.astype(np.int32), topk_idx=recording.topk_idx)
    params, _ = fit_hidden.fit_path(recording, E, synthetic.V, FIT, context=2)
    windows = path.recorded_windows(tokens, 2)[:, 1:].reshape(-1, 2)
    scores = path.scores(params, windows)
    idx = recording.topk_idx[:, :, 1:].reshape(L, -1, K)
    assert (recalls(scores, idx) > 0.95).all()


def test_edge_loss_by_hand():
    scores, idx = jnp.array([[[2.0, -1.0]]]), jnp.array([[[0]]])
    p = 1 / (1 + np.exp([-2.0, 1.0]))
    plain = -np.log(p[0]) - np.log(1 - p[1])
    focal = -(1 - p[0]) * np.log(p[0]) - p[1] * np.log(1 - p[1])
    load = (p[0] - 1) ** 2 + p[1] ** 2  # a load of 0 counts as one token of the batch
    for cfg, want in (
        (LlaporConfig(focal=0, balance=0), plain),
        (LlaporConfig(focal=1, balance=0), focal),
        (LlaporConfig(focal=1, balance=2), focal + 2 * load),
    ):
        np.testing.assert_allclose(fit_hidden.edge_loss(scores, idx, cfg), want, rtol=1e-5)


def test_ranking_loss_by_hand():
    scores = jnp.array([[[3.0, 1.0, 0.0]]])
    want = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-3.0))) / 2
    got = fit_hidden.ranking_loss(scores, jnp.array([[[0]]]))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    none = fit_hidden.ranking_loss(scores, jnp.array([[[3]]]))  # padding has no chosen
    assert (
        jnp.isfinite(none)
        and jax.grad(lambda s: fit_hidden.ranking_loss(s, jnp.array([[[0]]])))(scores)[0, 0, 0] < 0
    )
