"""A byte corpus from text files, split by file, with batches that are a function of the step.

The default corpus is the Python standard library's own source, which every machine has. Files are
read in sorted order and each is followed by a NUL byte; the held-out side is a seeded sample of
whole files. Below 20 files a 5 % sample of files does not exist, so the files are first cut into
contiguous blocks and blocks are sampled instead.

Axis letters:
    N  bytes of one side    B  sequences in a batch    S  positions
"""

import dataclasses
import itertools
import os
import pathlib
import sysconfig

import numpy as np

from moejax.core.errors import InputError, check, check_seed

SEPARATOR = b"\x00"
_MAX_BLOCK_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text, and how it is split.

    Attributes:
        path: a text file or a folder (searched recursively, hidden names left out); None is the
            standard library.
        pattern: which file names of a folder count, as in `fnmatch`.
        heldout_fraction: share of files (or blocks) held out.
        seed: of the split.
    """

    path: str | None = None
    pattern: str = "*"
    heldout_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self):
        fraction = self.heldout_fraction
        check(0 < fraction < 1, f"heldout_fraction={fraction} must be between 0 and 1")
        check_seed(self.seed)
        check(self.path != "", "the data path is empty; name a text file or a folder")


@dataclasses.dataclass(frozen=True)
class Span:
    """Where a document lies in its side of the corpus; its separator is at `stop`, outside it."""

    name: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One side of a corpus."""

    data: np.ndarray  # uint8 [N]
    spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Both sides; `skipped` names the files of the standard library that are not UTF-8."""

    train: Split
    heldout: Split
    skipped: tuple[str, ...] = ()


def load_corpus(cfg: TextConfig) -> Corpus:
    """Reads and splits the text; raises `InputError` naming the file that is missing or not text.

    Cost: one read of every file; 30 MB in about a second.
    """
    if cfg.path is None:
        documents, skipped = _read_stdlib()
    else:
        documents, skipped = _read_path(pathlib.Path(cfg.path), cfg.pattern), ()
    if round(len(documents) * cfg.heldout_fraction) == 0:
        documents = _cut(documents, cfg.heldout_fraction)
    held = _sample(len(documents), cfg)
    sides = [
        _join(_merge([d for d, h in zip(documents, held, strict=True) if h == side]))
        for side in (False, True)
    ]
    return Corpus(train=sides[0], heldout=sides[1], skipped=skipped)


def check_batches(corpus: Corpus, batch_size: int, seq_len: int) -> None:
    """Raises `InputError` when the corpus is too small for one batch or one held-out window."""
    have, want = len(corpus.train.data), batch_size * (seq_len + 1)
    check(
        have >= want,
        f"corpus too small: {have} training bytes, one batch of batch_size={batch_size} sequences "
        f"of seq_len={seq_len} wants {want}",
    )
    have, want = len(corpus.heldout.data), seq_len + 1
    check(
        have >= want,
        f"corpus too small: {have} held-out bytes, one window of seq_len={seq_len} wants {want}",
    )


def batch(data: np.ndarray, seed: int, step: int, *, batch_size: int, seq_len: int) -> np.ndarray:
    """int32 [B, S + 1] random windows of `data` uint8 [N]; inputs and targets overlap by S - 1.

    A pure function of (seed, step): a resumed run sees the same data with no iterator to restore.
    """
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, len(data) - seq_len, batch_size)
    return windows(data, starts, seq_len)


def windows(data: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    """int32 [B, S + 1] windows of `data` that begin at `starts` [B]."""
    return data[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def sample_windows(length: int, seq_len: int, num_bytes: int, seed: int = 0) -> np.ndarray:
    """Sorted starts of disjoint windows that score about `num_bytes` of `length` bytes.

    The window at i scores the bytes i + 1 ... i + seq_len. All windows when there are fewer.
    """
    count = (length - 1) // seq_len
    wanted = max(1, num_bytes // seq_len)
    chosen = np.random.default_rng(seed).permutation(count)[:wanted]
    return np.sort(chosen) * seq_len


@dataclasses.dataclass(frozen=True)
class _Document:
    """`text[start:stop]` of a file; whole files unless they were cut."""

    name: str
    text: bytes
    start: int
    stop: int
    whole: bool


def _read_stdlib() -> tuple[list[_Document], tuple[str, ...]]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    documents, skipped = [], []
    for path in _list_files(root, "*.py", ("site-packages", "dist-packages")):
        # A few of the library's own tests are deliberately in other encodings.
        try:
            documents += _read_file(path, path.relative_to(root).as_posix())
        except InputError:
            skipped.append(path.relative_to(root).as_posix())
    check(bool(documents), f"no *.py files in the standard library's folder {root}; pass --data")
    return documents, tuple(skipped)


def _read_path(path: pathlib.Path, pattern: str) -> list[_Document]:
    check(path.exists(), f"data path {path} does not exist")
    if not path.is_dir():
        # Reading a device or a pipe might never end.
        check(path.is_file(), f"data path {path} is neither a regular file nor a folder")
        documents = _read_file(path, path.name)
        check(bool(documents), f"data file {path} is empty")
        return documents
    files = _list_files(path, pattern)
    check(bool(files), f"data folder {path} has no files that match {pattern!r}")
    documents = [d for f in files for d in _read_file(f, f.relative_to(path).as_posix())]
    check(bool(documents), f"data folder {path} has {len(files)} files, all empty")
    return documents


def _list_files(
    root: pathlib.Path, pattern: str, excluded: tuple[str, ...] = ()
) -> list[pathlib.Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read data folder {error.filename}: {error.strerror}") from error

    found = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [s for s in subfolders if s not in excluded and not s.startswith(".")]
        paths = [pathlib.Path(folder, name) for name in names if not name.startswith(".")]
        found += [p for p in paths if p.match(pattern) and p.is_file()]
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def _read_file(path: pathlib.Path, name: str) -> list[_Document]:
    """One document, none for an empty file; raises `InputError` unless the file is text."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read data file {path}: {error.strerror}") from error
    nul = text.find(SEPARATOR)
    check(nul < 0, f"data file {path} is not text: NUL byte at offset {nul}")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data file {path} is not UTF-8 text: byte 0x{text[error.start]:02x} at offset "
            f"{error.start}"
        ) from error
    return [_Document(name, text, 0, len(text), whole=True)] if text else []


def _cut(documents: list[_Document], fraction: float) -> list[_Document]:
    """Blocks of equal size, small enough that at least two of them can be held out."""
    total = sum(d.stop for d in documents)
    size = max(1, min(_MAX_BLOCK_BYTES, int(total * fraction / 2)))
    return [
        _Document(d.name, d.text, start, min(start + size, d.stop), whole=False)
        for d in documents
        for start in range(0, d.stop, size)
    ]


def _sample(count: int, cfg: TextConfig) -> np.ndarray:
    """bool [count], True for held out."""
    order = np.random.default_rng(cfg.seed).permutation(count)
    held = np.zeros(count, bool)
    held[order[: round(count * cfg.heldout_fraction)]] = True
    return held


def _merge(documents: list[_Document]) -> list[_Document]:
    """Joins blocks that follow each other in one file, so that no separator falls between them."""
    merged: list[_Document] = []
    for d in documents:
        last = merged[-1] if merged else None
        if last and not d.whole and last.text is d.text and last.stop == d.start:
            merged[-1] = dataclasses.replace(last, stop=d.stop)
        else:
            merged.append(d)
    return merged


def _join(documents: list[_Document]) -> Split:
    data = b"".join(d.text[d.start : d.stop] + SEPARATOR for d in documents)
    ends = itertools.accumulate(d.stop - d.start + 1 for d in documents)
    spans = tuple(
        Span(
            d.name if d.whole else f"{d.name}[{d.start}:{d.stop}]",
            end - 1 - (d.stop - d.start),
            end - 1,
        )
        for d, end in zip(documents, ends, strict=True)
    )
    return Split(data=np.frombuffer(data, np.uint8), spans=spans)
