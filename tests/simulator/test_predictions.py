"""A real predictor's scores as a workload's predictions, and how far down they can be trusted."""

import dataclasses

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.costmodel.hardware import get_machine
from moejax.simulator.plans import FIXED, Plan
from moejax.simulator.predictions import precision_by_rank, votes_of_scores, with_votes
from moejax.simulator.step_times import simulate
from moejax.simulator.workload import Lanes, make_workload
from tests.simulator.test_workload import FACTS

L, N, B, E, K = 3, 24, 2, 12, 3
STATIC = Plan(name="", serve="fetch", keep="static")


@pytest.fixture(scope="module")
def scores():
    return np.random.default_rng(0).normal(size=(L, N, B, E)).astype(np.float32)


@pytest.fixture(scope="module")
def work(scores):
    chosen = np.argsort(-scores, axis=-1)[..., :K].astype(np.int32)
    lanes = Lanes(chosen=chosen, num_experts=E, expert_bytes=np.full(L, 10**7), is_cut=False)
    facts = FACTS | {"dense_bytes": 1e8}
    return make_workload(lanes, slice(0, 8), slice(8, N), recall=1.0, **facts)


def test_votes_are_the_tokens_that_an_expert_is_predicted_to_serve(scores, work):
    votes = votes_of_scores(scores[1:], K)[8:]
    np.testing.assert_array_equal(np.floor(votes[:, 1:]), work.tokens[:, 1:])
    assert not votes[:, 0].any()
    early = votes_of_scores(scores, K, horizon=0)[8:]
    np.testing.assert_array_equal(np.floor(early), work.tokens)
    # Of equally many tokens the likelier expert goes first.
    one = votes_of_scores(scores[1:, :, :1], K)
    best = np.argmax(one[:, 1:], axis=-1)
    np.testing.assert_array_equal(best.T, np.argmax(scores[1:, :, 0], axis=-1))


def test_precision_by_rank_behind_a_static_cache(work):
    """The cache never changes, so a guess is right where it is wanted and not among the hottest."""
    rng = np.random.default_rng(1)
    votes = np.where(rng.random(work.tokens.shape) < 0.5, 1 + rng.random(work.tokens.shape), 0.0)
    given = with_votes(work, votes, np.ones(1))
    cached = np.argsort(-work.past, axis=1, kind="stable")[:, :4]
    asked, right = np.zeros(E), np.zeros(E)
    for step, layer in np.ndindex(N - 8, L):
        guesses = [e for e in np.argsort(-votes[step, layer]) if votes[step, layer, e]]
        absent = [e for e in guesses if e not in cached[layer]]
        asked[: len(absent)] += 1
        right[: len(absent)] += work.tokens[step, layer, absent] > 0
    got = precision_by_rank(given, STATIC, slots=4 * L)
    np.testing.assert_allclose(got, right[asked > 0] / asked[asked > 0])
    perfect = with_votes(work, work.tokens, np.ones(1))
    np.testing.assert_array_equal(precision_by_rank(perfect, FIXED["lru"], slots=4 * L), 1.0)


def test_lanes_limit_what_is_moved_and_no_prediction_is_no_prefetch(work):
    machine = get_machine("A100-PCIe4")
    wrong = with_votes(work, np.where(work.tokens > 0, 0.0, 1.0), np.zeros(1))
    plan = dataclasses.replace(FIXED["next_gate"], keep="static")
    for lanes in (0, 1, 2):
        times = simulate(wrong, machine, dataclasses.replace(plan, lanes=lanes), slots=4 * L)
        # Layer 0 is prefetched by nobody; every other layer has wrong guesses enough.
        assert (times.wasted_bytes == lanes * (L - 1) * 10**7).all()
    silent = with_votes(work, np.zeros(work.tokens.shape), np.zeros(0))
    base = simulate(work, machine, STATIC, slots=4 * L)
    np.testing.assert_array_equal(
        simulate(silent, machine, plan, slots=4 * L).seconds, base.seconds
    )


def test_votes_of_other_steps_are_refused(work):
    with pytest.raises(InputError, match="votes are .16, 2, 12., the steps want .16, 3, 12."):
        with_votes(work, np.zeros((16, 2, 12)), np.ones(1))
