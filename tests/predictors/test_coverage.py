"""Figures of a batch, counted by hand."""

import numpy as np
import pytest

from moejax.predictors.coverage import batch_figures, one_hot_sets

E = 6
LEAN = np.linspace(0.0, 0.01, E)[::-1]  # orders experts with as many votes by their number


def figures(predicted, chosen, sizes, batch):
    """Sets of one layer and one position, a row per sequence."""
    predicted, chosen = (np.array(sets)[None, :, None] for sets in (predicted, chosen))
    return batch_figures(one_hot_sets(predicted, E) + LEAN, chosen, sizes, batch)


def test_coverage_of_a_batch():
    """Three sequences share m fetches: 2 votes for expert 0, one for each of 1, 2, 3 and 5."""
    sets = [[0, 1], [0, 2], [3, 5]]
    got = figures(sets, sets, (1, 2, 5), batch=3)
    assert got.token_coverage == {1: [2 / 6], 2: [3 / 6], 5: [6 / 6]}
    assert got.coverage_error == {1: [0.0], 2: [0.0], 5: [0.0]}
    # Four experts share the second rank: whichever is named is one of the two hottest.
    assert got.hot_rank == {1: [1.0], 2: [1.0], 5: [1.0]}


def test_a_wrong_ranking_is_told():
    """Votes 3: 3, 0: 2, 1: 1; volume 0: 3, 1: 2, 4: 1."""
    got = figures([[3, 0], [3, 0], [3, 1]], [[0, 1], [0, 1], [0, 4]], (1, 2, 3), batch=3)
    assert got.token_coverage == {1: [0.0], 2: [3 / 6], 3: [5 / 6]}
    assert got.coverage_error == {
        1: [1.0],
        2: [pytest.approx(1 - 3 / 5)],
        3: [pytest.approx(1 - 5 / 6)],
    }
    assert got.hot_rank == {1: [0.0], 2: [1 / 2], 3: [2 / 3]}


def test_experts_that_nobody_asked_for_are_not_hot():
    """Two experts are asked for; of four named, two are right and no more were to be had."""
    got = figures([[2, 3], [2, 5]], [[2, 3], [2, 3]], (1, 4), batch=2)
    assert got.hot_rank == {1: [1.0], 4: [1.0]}
    got = figures([[0, 1], [4, 5]], [[2, 3], [2, 3]], (4,), batch=2)
    assert got.hot_rank == {4: [0.0]}


def test_padding_votes_for_nothing():
    got = figures([[0, 1], [0, 1], [4, 5]], [[E, E], [E, E], [4, 5]], (2,), batch=3)
    assert got.token_coverage == {2: [1.0]} and got.hot_rank == {2: [1.0]}


def test_sequences_past_whole_batches_are_left_out():
    got = figures([[0, 1], [0, 1], [4, 5]], [[0, 1], [0, 1], [2, 3]], (2,), batch=2)
    assert got.token_coverage == {2: [1.0]}
