"""A cache whose slots follow a predicted path."""

import dataclasses

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.simulator.demand_slots import dealt, fixed, follow
from moejax.simulator.workload import Lanes, make_workload
from tests.simulator.test_workload import FACTS

L, N, E, K = 3, 40, 8, 2


@pytest.fixture(scope="module")
def work():
    """Three times as many experts of layer 0 take part as of the others."""
    rng = np.random.default_rng(0)
    chosen = np.stack(
        [np.stack([rng.permutation(n)[:K] for _ in range(N)]) for n in (6, 2, 2)]
    ).astype(np.int32)[:, :, None]
    lanes = Lanes(chosen=chosen, num_experts=E, expert_bytes=np.full(L, 10**7), is_cut=False)
    return make_workload(lanes, slice(0, 10), slice(10, N), recall=1.0, **FACTS)


def test_without_predictions_it_is_a_least_recently_used_cache(work):
    silent = np.zeros(work.tokens.shape)
    quotas = np.array([3, 2, 2])
    got = follow(work, silent, fixed(quotas))
    hits = 0
    for layer, size in enumerate(quotas):
        held = list(np.argsort(-work.past[layer], kind="stable")[:size][::-1])
        for tokens in work.tokens[:, layer]:
            wanted = [int(e) for e in np.flatnonzero(tokens)]
            hits += sum(e in held for e in wanted)
            held = ([e for e in held if e not in wanted] + wanted[::-1])[-size:]
    assert got.lookups == L * K and got.prefetched == 0
    assert got.hits == pytest.approx(hits / len(work.tokens))
    assert got.moved == pytest.approx(L * K - got.hits)


def test_a_path_that_is_right_hits_all_and_moves_what_was_missing(work):
    truth = work.tokens.astype(float)
    got = follow(work, truth, dealt(6))
    assert got.hit_rate == 1 and got.prefetched_in_vain == 0
    assert got.moved == pytest.approx(got.prefetched) and 0 < got.moved < L * K


def test_slots_follow_the_number_of_experts_expected():
    votes = np.zeros((L, E))
    votes[0, :6] = 1.5
    votes[1, 0] = 9
    assert dealt(8)(votes).tolist() == [6, 1, 1]
    assert dealt(L * E + 5)(votes).tolist() == [E] * L


def test_a_wrong_path_is_corrected_and_counted(work):
    """Every guess is an expert that nobody wants: it costs its transfer, and no wanted expert."""
    never = np.zeros(work.tokens.shape)
    never[:, :, E - 1] = 1
    assert not work.tokens[:, :, E - 1].any()
    got = follow(work, never, fixed(np.array([3, 2, 2])))
    assert got.prefetched == got.prefetched_in_vain > 0
    blind = follow(work, np.zeros_like(never), fixed(np.array([3, 2, 2])))
    assert got.hits < blind.hits and got.moved > blind.moved
    one = dataclasses.replace(work, tokens=work.tokens[:1])
    assert follow(one, never[:1], fixed(np.array([3, 2, 2]))).prefetched == L


def test_votes_of_other_steps_are_refused(work):
    with pytest.raises(InputError, match="votes are .1, 3, 8., the steps want .30, 3, 8."):
        follow(work, np.zeros((1, L, E)), dealt(6))
