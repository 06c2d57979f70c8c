"""n-grams against a count by hand and against the definition of a distribution."""

import collections

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.ngram import bits_per_byte, fit_ngram, scored_positions


def by_hand(train, data, positions, order, a):
    counts = collections.Counter(train[i : i + order] for i in range(len(train) - order + 1))
    padded = bytes(order - 1) + data
    bits = 0.0
    for p in positions:
        gram = padded[p : p + order]
        context = sum(n for g, n in counts.items() if g[:-1] == gram[:-1])
        bits -= np.log2((counts[gram] + a) / (context + 256 * a))
    return bits / len(positions)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_equals_a_count_by_hand(order):
    rng = np.random.default_rng(0)
    train, data = (rng.choice([0, 65, 66, 255], n).astype(np.uint8) for n in (400, 60))
    positions = np.arange(60)
    model = fit_ngram(train, order, smoothing=0.1)
    got = bits_per_byte(model, data, positions)
    assert got == pytest.approx(by_hand(bytes(train), bytes(data), positions, order, 0.1))


def test_sees_true_bytes_before_a_window():
    train = np.frombuffer(b"ab" * 200 + b"cb" * 2, np.uint8)
    data = np.frombuffer(b"xab", np.uint8)
    model = fit_ngram(train, 2)
    assert bits_per_byte(model, data, np.array([2])) < 0.2


def test_unseen_context_is_uniform():
    model = fit_ngram(np.frombuffer(b"aaaa", np.uint8), 3)
    assert bits_per_byte(model, np.frombuffer(b"zzzz", np.uint8), np.array([3])) == 8.0


def test_scored_positions_follow_each_window_start():
    np.testing.assert_array_equal(scored_positions(np.array([0, 6]), 3), [1, 2, 3, 7, 8, 9])


def test_refuses_orders_and_data_out_of_range():
    with pytest.raises(InputError, match="order=4"):
        fit_ngram(np.zeros(10, np.uint8), 4)
    with pytest.raises(InputError, match="wants 3 bytes, got 2"):
        fit_ngram(np.zeros(2, np.uint8), 3)
