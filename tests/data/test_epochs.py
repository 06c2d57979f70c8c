"""Epochs: every window once, another order every time, the same rows in every process."""

import itertools

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.epochs import ShuffledWindows
from moejax.data.source import RandomWindows

DATA = np.arange(101, dtype=np.uint8)  # 20 windows of 5 + 1


def source(**rest):
    return ShuffledWindows(**dict(data=DATA, seed=3, batch_size=4, seq_len=5) | rest)


def take(source, step, rows, count):
    batches = source.batches(step, np.array(rows))
    taken = list(itertools.islice(batches, count))
    batches.close()
    return np.array(taken)


def test_an_epoch_is_every_window_once():
    tokens = take(source(), 0, range(4), 10)  # two epochs of five batches
    assert tokens.shape == (10, 4, 6) and tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[..., 1:] - tokens[..., :-1], 1)  # DATA counts up
    starts = tokens[..., 0].reshape(2, 20)
    np.testing.assert_array_equal(np.sort(starts, axis=1), np.tile(np.arange(0, 100, 5), (2, 1)))
    assert not np.array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], np.sort(starts[0]))


def test_a_step_does_not_depend_on_where_one_begins_or_on_the_rows():
    whole = take(source(), 0, range(4), 9)
    np.testing.assert_array_equal(take(source(read_ahead=1), 7, [1, 3], 2), whole[7:9, [1, 3]])
    assert not np.array_equal(take(source(seed=4), 0, range(4), 1), whole[:1])


def test_another_order_is_another_run():
    random = RandomWindows(data=DATA, seed=3, batch_size=4, seq_len=5)
    assert len({random.crc32, source().crc32, source(data=DATA[:-1]).crc32}) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(data=DATA[:20]), "20 training bytes are 3 windows of seq_len=5, .* batch_size=4"),
        (dict(data=DATA[:0]), "0 training bytes are 0 windows"),
        (dict(read_ahead=0), "read_ahead=0 must be at least 1"),
    ],
)
def test_refuses_what_cannot_make_a_batch(change, message):
    with pytest.raises(InputError, match=message):
        source(**change)
