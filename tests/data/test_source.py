"""Random windows: a batch is a function of (seed, step), whoever asks for which rows."""

import itertools

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.source import RandomWindows
from moejax.data.text import batch

DATA = np.arange(200, dtype=np.uint8)


def source(**rest):
    return RandomWindows(**dict(data=DATA, seed=3, batch_size=4, seq_len=6) | rest)


def take(source, step, rows, count):
    return list(itertools.islice(source.batches(step, np.array(rows)), count))


def test_every_step_has_its_batch():
    got = take(source(), 5, range(4), 3)
    for step, rows in zip((5, 6, 7), got, strict=True):
        np.testing.assert_array_equal(rows, batch(DATA, 3, step, batch_size=4, seq_len=6))
    assert not np.array_equal(got[0], take(source(seed=4), 5, range(4), 1)[0])


def test_rows_are_those_of_the_whole_batch():
    (whole,), (part,) = take(source(), 2, range(4), 1), take(source(), 2, [1, 3], 1)
    np.testing.assert_array_equal(part, whole[[1, 3]])


def test_data_are_told_apart():
    assert source().crc32 != source(data=DATA[:-1]).crc32


def test_refuses_a_corpus_below_one_batch():
    with pytest.raises(InputError, match="corpus too small: 27 training bytes, one batch wants 28"):
        source(data=DATA[:27])
