"""The corpus: what is read, how it is split, which batches come out, and what is refused."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.text import (
    TextConfig,
    batch,
    check_batches,
    load_corpus,
    sample_windows,
    windows,
)


def write_files(folder, count, size=50):
    for i in range(count):
        (folder / f"{i:03d}.txt").write_text(f"<{i}>".ljust(size, "x"))


def texts(split):
    return {s.name: bytes(split.data[s.start : s.stop]) for s in split.spans}


def test_split_by_file_is_a_seeded_partition(tmp_path):
    write_files(tmp_path, 40)
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_bytes(b"\xff")
    corpus = load_corpus(TextConfig(path=str(tmp_path)))
    train, heldout = texts(corpus.train), texts(corpus.heldout)
    assert len(heldout) == 2 and len(train) == 38
    assert {n: t.decode() for n, t in (train | heldout).items()} == {
        f"{i:03d}.txt": f"<{i}>".ljust(50, "x") for i in range(40)
    }
    again = load_corpus(TextConfig(path=str(tmp_path)))
    np.testing.assert_array_equal(again.heldout.data, corpus.heldout.data)
    other = load_corpus(TextConfig(path=str(tmp_path), seed=1))
    assert texts(other.heldout) != heldout


def test_files_are_in_sorted_order_with_a_nul_after_each(tmp_path):
    write_files(tmp_path, 40)
    train = load_corpus(TextConfig(path=str(tmp_path))).train
    assert [s.name for s in train.spans] == sorted(s.name for s in train.spans)
    assert bytes(train.data).count(b"\0") == 38
    assert all(train.data[s.stop] == 0 for s in train.spans)


def test_single_file_is_split_by_contiguous_blocks(tmp_path):
    text = "".join(f"{i:05d}\n" for i in range(5000))
    (tmp_path / "big.txt").write_text(text)
    corpus = load_corpus(TextConfig(path=str(tmp_path / "big.txt")))
    spans = {**texts(corpus.train), **texts(corpus.heldout)}
    ranges = sorted(tuple(map(int, n.split("[")[1][:-1].split(":"))) for n in spans)
    assert ranges[0][0] == 0 and ranges[-1][1] == len(text)
    assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    for name, piece in spans.items():
        start, stop = map(int, name.split("[")[1][:-1].split(":"))
        assert piece.decode() == text[start:stop]
    assert len(corpus.heldout.data) == pytest.approx(0.05 * len(text), rel=0.05)
    # Two blocks are held out, so at most three pieces remain: neighbours are not separated.
    assert bytes(corpus.train.data).count(b"\0") <= 3


def test_pattern_selects_files_of_a_folder(tmp_path):
    write_files(tmp_path, 20)
    (tmp_path / "binary.bin").write_bytes(b"\x00\x01")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more.txt").write_text("more")
    corpus = load_corpus(TextConfig(path=str(tmp_path), pattern="*.txt"))
    names = texts(corpus.train) | texts(corpus.heldout)
    assert len(names) == 21 and "sub/more.txt" in names


def test_default_is_the_standard_library():
    corpus = load_corpus(TextConfig())
    names = [s.name for s in corpus.train.spans + corpus.heldout.spans]
    assert "json/decoder.py" in names
    assert not any("site-packages" in name for name in names)
    assert not set(corpus.skipped) & set(names)
    assert len(corpus.train.data) > 5_000_000
    check_batches(corpus, batch_size=8, seq_len=128)


def test_batch_is_a_function_of_seed_and_step():
    data = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    shape = dict(batch_size=4, seq_len=16)
    first = batch(data, 7, 3, **shape)
    assert first.shape == (4, 17) and first.dtype == np.int32
    np.testing.assert_array_equal(first, batch(data, 7, 3, **shape))
    assert (first != batch(data, 7, 4, **shape)).any()
    assert (first != batch(data, 8, 3, **shape)).any()
    text = bytes(data)
    assert all(bytes(row.astype(np.uint8)) in text for row in first)


def test_batch_reaches_both_ends():
    data = np.arange(18, dtype=np.uint8)
    seen = np.concatenate([batch(data, 0, s, batch_size=4, seq_len=16)[:, 0] for s in range(20)])
    assert set(seen.tolist()) == {0, 1}


def test_sampled_windows_are_disjoint_and_inside():
    starts = sample_windows(10_001, 100, 2_000)
    assert len(starts) == 20 and (np.diff(starts) >= 100).all()
    everything = sample_windows(1001, 100, 10**9)
    np.testing.assert_array_equal(everything, np.arange(10) * 100)
    assert windows(np.zeros(1001, np.uint8), everything, 100).shape == (10, 101)


def refused(tmp_path, **cfg):
    with pytest.raises(InputError) as error:
        load_corpus(TextConfig(path=str(tmp_path), **cfg))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refuses_missing_path(tmp_path):
    assert refused(tmp_path / "none") == f"data path {tmp_path / 'none'} does not exist"


def test_refuses_empty_file_and_folder(tmp_path):
    (tmp_path / "e").touch()
    assert "is empty" in refused(tmp_path / "e")
    assert "has 1 files, all empty" in refused(tmp_path)
    assert "no files that match '*.md'" in refused(tmp_path, pattern="*.md")


@pytest.mark.parametrize(
    "content,message",
    [(b"ab\x00c", "NUL byte at offset 2"), (b"abc\xff", "byte 0xff at offset 3")],
)
def test_refuses_what_is_not_text_and_says_which_file(tmp_path, content, message):
    write_files(tmp_path, 30)
    (tmp_path / "bad.txt").write_bytes(content)
    assert message in (said := refused(tmp_path)) and "bad.txt" in said


def test_refuses_corpus_smaller_than_a_batch(tmp_path):
    (tmp_path / "small.txt").write_text("x" * 200)
    corpus = load_corpus(TextConfig(path=str(tmp_path / "small.txt")))
    with pytest.raises(InputError, match=r"\d+ training bytes, .* batch_size=8 .* wants 1032"):
        check_batches(corpus, batch_size=8, seq_len=128)
    with pytest.raises(InputError, match=r"\d+ held-out bytes, .* seq_len=20 wants 21"):
        check_batches(corpus, batch_size=1, seq_len=20)


@pytest.mark.parametrize("field", [dict(heldout_fraction=0.0), dict(seed=-1)])
def test_refuses_wrong_config(field):
    with pytest.raises(InputError, match=next(iter(field))):
        TextConfig(**field)
