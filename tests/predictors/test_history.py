"""The history predictor starts as popularity and reads nothing of the model."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.predictors import features, history
from tests.predictors import synthetic
from tests.predictors.synthetic import E, L, V


def test_unfitted_is_popularity():
    recording = synthetic.chained_choices(np.random.default_rng(0), batch=4, length=8)
    share = jnp.asarray(features.popularity(recording.topk_idx, E))
    params = history.init_history(jax.random.key(0), share, vocab_size=V, embedding=8, hidden=16)
    recorded = features.recorded_features(recording, share)
    for layer in range(L - 1):
        now = jax.tree.map(lambda leaf, layer=layer: leaf[layer], recorded)
        got = jax.nn.sigmoid(history.scores(params, layer, now))
        want = np.clip(np.asarray(share)[layer + 1], 1e-4, 1 - 1e-4)
        np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=1e-4, atol=1e-6)


def test_scores_depend_on_token_recent_and_average():
    recording = synthetic.chained_choices(np.random.default_rng(0), batch=2, length=4)
    share = jnp.asarray(features.popularity(recording.topk_idx, E))
    params = history.init_history(jax.random.key(0), share, vocab_size=V, embedding=8, hidden=16)
    noise = jax.random.normal(jax.random.key(1), params.net.mlp.w_linear.shape)
    params = params.replace(net=params.net.replace(mlp=params.net.mlp.replace(w_linear=noise)))
    recorded = jax.tree.map(lambda leaf: leaf[0], features.recorded_features(recording, share))
    base = np.asarray(history.scores(params, 0, recorded))
    for name, other in {
        "token": (recorded.token + 1) % V,
        "recent": (recorded.recent + 1) % E,
        "ema": recorded.ema[::-1],
    }.items():
        changed = np.asarray(history.scores(params, 0, recorded.replace(**{name: other})))
        assert np.abs(changed - base).max() > 0.01, name
