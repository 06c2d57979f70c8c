"""Baselines against counts by hand, and on routing where one of them must be right."""

import numpy as np

from moejax.predictors import baselines, evaluate
from tests.predictors import synthetic
from tests.predictors.synthetic import E, K, L


def recall(scores, recording) -> np.ndarray:
    result = evaluate.evaluate(scores, recording, expert_bytes=1)
    return np.array(result.recall[K])


def test_popularity_is_one_order_for_all():
    rng = np.random.default_rng(0)
    idx = np.zeros((L, 2, 5, 2), np.int32)
    idx[..., 0], idx[..., 1] = 3, 7
    idx[1:, 0, 0] = [4, 3]
    always = synthetic.from_choices(idx, rng)
    scores = baselines.popular_scores(always, always, E)
    assert scores.shape == (L - 1, 2, 5, E)
    np.testing.assert_allclose(scores[0, 1, 4, [3, 7, 4, 0]], [1.0, 0.9, 0.1, 0.0], rtol=1e-6)


def test_previous_token_does_not_cross_sequences():
    rng = np.random.default_rng(0)
    recording = synthetic.chained_choices(rng, batch=3, length=4)
    scores = baselines.previous_token_scores(recording, recording, E)
    popular = baselines.popular_scores(recording, recording, E)
    np.testing.assert_array_equal(scores[:, :, 0], popular[:, :, 0])
    for layer in range(L - 1):
        before = recording.topk_idx[layer + 1, 1, 2]
        best = np.argsort(-scores[layer, 1, 3], kind="stable")[:K]
        assert set(best) == set(before)


def test_bigram_reads_a_chain_and_nothing_else_does():
    rng = np.random.default_rng(0)
    recording = synthetic.chained_choices(rng, batch=24, length=64)
    fit = synthetic.take(recording, slice(0, 16))
    held_out = synthetic.take(recording, slice(16, 24))
    # A pair of letters occurs in 2 / 16 of the tokens by chance, so the chain stands out.
    np.testing.assert_array_equal(recall(baselines.bigram_scores(fit, held_out, E), held_out), 1.0)
    for baseline in (
        baselines.popular_scores,
        baselines.previous_token_scores,
        baselines.token_table_scores,
    ):
        near_chance = recall(baseline(fit, held_out, E), held_out)
        np.testing.assert_allclose(near_chance, K / E, atol=0.05)


def test_bigram_is_naive_bayes():
    """P(e) and P(a | e) of two tokens, by hand."""
    idx = np.array([[[[0], [1]]], [[[2], [2]]]])  # layer 0 chose 0 then 1, layer 1 chose 2 twice
    recording = synthetic.from_choices(idx, np.random.default_rng(0))
    scores = baselines.bigram_scores(recording, recording, 3)[0, 0, 0]
    prior = np.array([1, 1, 3]) / 5
    given_0 = np.array([0.5 / 2, 0.5 / 2, 1.5 / 4])  # expert 0 before each of 0, 1, 2
    np.testing.assert_allclose(scores, np.log(prior) + np.log(given_0), rtol=1e-6)


def test_token_table_reads_a_table():
    rng = np.random.default_rng(0)
    recording = synthetic.chained_choices(rng, batch=8, length=64)
    table = np.stack([rng.permuted(np.arange(E))[:K] for _ in range(synthetic.V)])
    idx = np.broadcast_to(table[recording.tokens][None], recording.topk_idx.shape)
    by_token = synthetic.Recording(
        tokens=recording.tokens,
        topk_idx=np.ascontiguousarray(idx, np.int32),
        topk_weights=recording.topk_weights,
    )
    scores = baselines.token_table_scores(by_token, by_token, E)
    np.testing.assert_array_equal(recall(scores, by_token), 1.0)
    count = (by_token.tokens == 4).sum()
    share = (idx[0] == table[4, 0]).any(-1).mean()
    row = np.argwhere(by_token.tokens == 4)[0]
    got = scores[0, row[0], row[1], table[4, 0]]
    np.testing.assert_allclose(got, (count + 5 * share) / (count + 5), rtol=1e-6)


def test_shuffled_targets_read_chance():
    """With choices dealt to other tokens every baseline falls to popularity, about K / E."""
    rng = np.random.default_rng(0)
    recording = synthetic.shuffled_targets(synthetic.chained_choices(rng, 24, 64), rng)
    fit = synthetic.take(recording, slice(0, 16))
    held_out = synthetic.take(recording, slice(16, 24))
    for baseline in (baselines.bigram_scores, baselines.token_table_scores):
        near_chance = recall(baseline(fit, held_out, E), held_out)
        np.testing.assert_allclose(near_chance, K / E, atol=0.05)


def test_next_gate_baseline_asks_the_next_router():
    rng = np.random.default_rng(0)
    recording, routers = synthetic.rotated_stream(rng, batch=4, length=8)
    scores = baselines.next_gate_scores(recording, routers, synthetic.CFG)
    want = recording.hidden[:-1] @ np.asarray(routers.w_router)[1:, None]
    np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-4)
