"""Recall by layer group: the same target layers for predictors of every horizon."""

import numpy as np

from experiments.hidden_steps import report
from experiments.hidden_steps.predict import HORIZONS
from experiments.hidden_steps.states import Recorded
from moejax.predictors.evaluate import evaluate
from moejax.predictors.recording import Recording

L, N, S, E, K = 5, 4, 6, 8, 2


def test_groups_and_domains():
    rng = np.random.default_rng(0)
    idx = rng.permuted(np.tile(np.arange(E), (L, N, S, 1)), axis=-1)[..., :K].astype(np.int32)
    routing = Recording(
        tokens=np.zeros((N, S), np.int32),
        topk_idx=idx,
        topk_weights=np.full(idx.shape, 0.5, np.float32),
    )
    held = Recorded(
        routing=routing, entering=np.zeros((L, N, S, 1)), domains=np.array(["a", "a", "b", "b"])
    )
    hot = np.zeros((L, N, S, E), np.float32)
    np.put_along_axis(hot, idx, 1.0, axis=-1)
    hot[1], hot[2] = -hot[1], hot[2] * 0  # wrong about layer 1, ties in layer 2
    hot[0] = -hot[0]  # counts for nobody
    scores = {name: hot[horizon:] for name, horizon in HORIZONS.items()}
    judged = {
        name: evaluate(scores[name], routing, expert_bytes=4, horizon=horizon)
        for name, horizon in HORIZONS.items()
    }
    figures = report.figures_of(judged, scores, held, K)
    for name, horizon in HORIZONS.items():
        groups = figures["recall_by_group"][name]
        assert groups["input"][str(K)] == 0 and groups["output"][str(K)] == 1
        mean = np.mean(judged[name].recall[K][1 - horizon :])
        assert figures["recall"][name][str(horizon)][str(K)] == mean
        domains = figures["recall_by_domain"][name]
        np.testing.assert_allclose((domains["a"] + domains["b"]) / 2, mean)
        assert len(figures["recall_by_target"][name]) == L - horizon
