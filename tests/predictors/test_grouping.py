"""Groups of sequences that share experts, against planted groups and counts by hand."""

import itertools

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.predictors.grouping import distinct_experts, similarity, two_groups

E = 8


def test_similarity_by_hand():
    """Two layers of eight experts: sets that differ in one expert are 2 of 16 apart."""
    idx = np.array([[[0, 1], [0, 1], [6, 7]], [[2, 3], [2, 4], [5, 7]]])
    got = similarity(idx, E)
    want = np.array([[16, 14, 8], [14, 16, 8], [8, 8, 16]]) / 16
    np.testing.assert_allclose(got, want)


def test_planted_groups_are_found():
    """Half of the sequences choose among experts 0 .. 3, the others among 4 .. 7."""
    rng = np.random.default_rng(0)
    kind = rng.permutation([0] * 8 + [1] * 8)
    chosen = rng.permuted(np.tile(np.arange(4), (3, 16, 1)), axis=-1)[..., :2]
    idx = chosen + 4 * kind[None, :, None]
    order = two_groups(similarity(idx, E))
    np.testing.assert_array_equal(np.sort(order), np.arange(16))
    assert len(set(kind[order[:8]])) == 1 and len(set(kind[order[8:]])) == 1
    assert distinct_experts(idx, order, E) <= 4 < distinct_experts(idx, np.arange(16), E)


def test_groups_stay_equal_when_the_kinds_are_not():
    idx = np.array([[[0], [0], [0], [0], [0], [7]]])
    order = two_groups(similarity(idx, E))
    np.testing.assert_array_equal(np.sort(order), np.arange(6))


def test_no_exchange_of_two_sequences_beats_the_medoids_that_were_found():
    rng = np.random.default_rng(1)
    alike = similarity(rng.permuted(np.tile(np.arange(E), (4, 8, 1)), axis=-1)[..., :3], E)
    order = two_groups(alike)
    halves = order[:4], order[4:]
    best = [half[alike[np.ix_(half, half)].sum(1).argmax()] for half in halves]

    def total(one, other):
        return alike[best[0], list(one)].sum() + alike[best[1], list(other)].sum()

    found = total(*halves)
    for a, b in itertools.product(*halves):
        one = [b if row == a else row for row in halves[0]]
        other = [a if row == b else row for row in halves[1]]
        assert total(one, other) <= found + 1e-12


def test_distinct_experts_by_hand():
    idx = np.array([[[0, 1], [1, 2], [3, E], [3, 4]]])
    assert distinct_experts(idx, np.arange(4), E) == (3 + 2) / 2
    assert distinct_experts(idx, np.array([0, 2, 1, 3]), E) == (3 + 4) / 2


def test_an_odd_number_is_refused():
    with pytest.raises(InputError, match="3 sequences are not two groups"):
        two_groups(np.eye(3))
