"""Fits reach what can be known, and no more; horizons in steps and in seconds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.predictors import baselines, evaluate, features, fit, history, residual
from moejax.predictors.config import FitConfig
from tests.predictors import synthetic
from tests.predictors.synthetic import CFG, E, K, L, V

STEPS = FitConfig(
    horizon_steps=120,
    batch=128,
    hidden=32,
    embedding=32,
    learning_rate=2e-2,
    drop_choices=0.0,
    drop_hidden=0.0,
)


def history_recall(params, recording) -> np.ndarray:
    recorded = features.recorded_features(recording, params.popularity, vocab_size=V)
    return recall(np.asarray(jax.jit(history.scores)(params, recorded)), recording)


def recall(scores, recording) -> np.ndarray:
    scores = scores.reshape(*recording.topk_idx[1:].shape[:-1], E)
    return np.array(evaluate.evaluate(scores, recording, expert_bytes=1).recall[K])


def split(recording):
    rows = recording.tokens.shape[0]
    return (
        synthetic.take(recording, slice(0, rows * 3 // 4)),
        synthetic.take(recording, slice(rows * 3 // 4, rows)),
    )


def test_residual_learns_the_rotation():
    recording, routers = synthetic.rotated_stream(np.random.default_rng(0), 64, 64, states=48)
    train, held_out = split(recording)
    params, losses = fit.fit_residual(train, routers, CFG, STEPS)
    assert len(losses) == STEPS.horizon_steps and losses[-1] < 0.3 * losses[0]
    ask = jax.jit(residual.scores, static_argnames="cfg")
    scores = [
        np.asarray(ask(params, layer, h.reshape(-1, synthetic.D), routers, cfg=CFG))
        for layer, h in enumerate(held_out.activations[:-1])
    ]
    learned = recall(np.stack(scores), held_out)
    next_gate = recall(baselines.next_gate_scores(held_out, routers, CFG), held_out)
    assert learned.min() > 0.98
    assert next_gate.max() < 0.3


def test_history_learns_the_chain():
    recording = synthetic.chained_choices(np.random.default_rng(0), batch=32, length=32)
    train, held_out = split(recording)
    params, losses = fit.fit_history(train, E, V, STEPS)
    assert losses[-1] < 0.1 * losses[0]
    assert history_recall(params, held_out).min() > 0.99


def test_shuffled_targets_leave_nothing_to_learn():
    rng = np.random.default_rng(0)
    recording = synthetic.shuffled_targets(synthetic.chained_choices(rng, 32, 32), rng)
    train, held_out = split(recording)
    params, _ = fit.fit_history(train, E, V, STEPS)
    np.testing.assert_allclose(history_recall(params, held_out), K / E, atol=0.05)


def test_step_horizon_is_reproducible_and_leaves_inputs_alone():
    recording, routers = synthetic.rotated_stream(np.random.default_rng(0), batch=4, length=16)
    cfg = FitConfig(horizon_steps=5, batch=32, hidden=8)
    seen = []
    first, losses = fit.fit_residual(
        recording, routers, CFG, cfg, progress=lambda *report: seen.append(report)
    )
    again, _ = fit.fit_residual(recording, routers, CFG, cfg)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert [(fraction, count) for fraction, count, _ in seen] == [
        (step / 5, step) for step in range(1, 6)
    ]
    assert all(np.isfinite(losses)) and np.isfinite(np.asarray(routers.w_router)).all()


def test_second_horizon_ends():
    recording, routers = synthetic.rotated_stream(np.random.default_rng(0), batch=4, length=16)
    seen = []
    cfg = FitConfig(horizon_secs=0.2, batch=32, hidden=8)
    _, losses = fit.fit_residual(
        recording, routers, CFG, cfg, progress=lambda *report: seen.append(report[0])
    )
    assert len(losses) >= 1 and seen == sorted(seen) and seen[-1] == 1.0


def test_a_fit_stops_where_it_is_told_on_the_same_schedule():
    """Every step of a noisy quadratic has a key of its own, the same in a shorter fit."""
    target = jnp.arange(8.0)[None, :, None]

    def loss(x, fixed, batch, key):
        return jnp.square(x - batch + fixed * jax.random.normal(key)).mean()

    def run(**options):
        cfg = FitConfig(horizon_steps=9, batch=4)
        rows = np.arange(8)
        return fit.minimize(loss, jnp.zeros(()), 0.1, target, rows, cfg, noisy=True, **options)

    seen = {}
    whole, losses = run(watch=lambda step, x: seen.update({step: float(x)}))
    stopped, first = run(stop=5)
    assert first == losses[:5] and len(losses) == 9 and len(set(losses)) == 9
    assert (
        seen[5] == float(stopped) and seen[9] == float(whole) and list(seen) == list(range(1, 10))
    )


def test_padding_is_not_fitted():
    """Padded tokens with impossible tokens and choices change no bit of the result."""
    rng = np.random.default_rng(0)
    recording = synthetic.chained_choices(rng, batch=4, length=16)
    idx = recording.topk_idx.copy()
    idx[:, :, 8:] = E
    tokens = recording.tokens.copy()
    tokens[:, 8:] = 0
    cfg = FitConfig(horizon_steps=5, batch=32, hidden=8, embedding=4)
    fits = []
    for padding in (0, V - 1):
        tokens[:, 8:] = padding
        padded = synthetic.Recording(
            tokens=tokens.copy(), topk_idx=idx, topk_weights=recording.topk_weights
        )
        fits.append(fit.fit_history(padded, E, V, cfg)[0])
    jax.tree.map(np.testing.assert_array_equal, *fits)


def test_what_cannot_be_fitted_is_refused():
    recording = synthetic.chained_choices(np.random.default_rng(0), batch=2, length=4)
    routers = synthetic.routers(np.random.default_rng(0))
    with pytest.raises(InputError, match="hidden states"):
        fit.fit_residual(recording, routers, CFG, FitConfig(horizon_steps=1))
    empty = synthetic.from_choices(np.full((L, 2, 4, K), E), np.random.default_rng(0))
    with pytest.raises(InputError, match="no tokens"):
        fit.fit_history(empty, E, V, FitConfig(horizon_steps=1))
