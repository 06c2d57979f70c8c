"""A corpus of byte-pair tokens, made once per run and kept beside its checkpoints.

The encoding (arXiv 1508.07909, over bytes) is trained on the training side alone. A run's folder
holds `tokenizer.json` and `corpus.npz`: who continues the run, or studies its model, reads the very
same tokens and split, whatever has been installed since.

Axis letters:
    N  tokens of one side
"""

import dataclasses
import itertools
import json
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from moejax.core.disk import writing
from moejax.core.errors import InputError, check
from moejax.data.domains import Document, DomainsConfig, read_domains
from moejax.data.text import Corpus, Span, Split

END = "<|end|>"  # token 0, after every document


def load_tokens(cfg: DomainsConfig, folder: str | os.PathLike) -> Corpus:
    """The corpus in `folder`, made there when it is not yet; uint16 tokens.

    Raises `InputError` for a corpus of another config. Cost of making it, for 4096 entries and 20
    MB of text: about a minute.
    """
    path = pathlib.Path(folder) / "corpus.npz"
    if not path.exists():
        _make(cfg, path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        stored, names = json.loads(str(arrays["config"])), json.loads(str(arrays["names"]))
        sides = [_split(arrays[side], arrays[f"{side}_stops"], names[side]) for side in SIDES]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no corpus of this library: {error}") from error
    wanted = dataclasses.asdict(cfg)
    check(stored == wanted, f"{path} was made with {stored}, not {wanted}; choose another folder")
    return Corpus(train=sides[0], heldout=sides[1])


SIDES = ("train", "heldout")


def spans_by_domain(split: Split) -> dict[str, list[Span]]:
    """The documents of each domain, by what their names begin with."""
    domains: dict[str, list[Span]] = {}
    for span in split.spans:
        domains.setdefault(span.name.partition("/")[0], []).append(span)
    return domains


def train_bpe(documents: list[Document], vocab_size: int) -> Any:
    """A `tokenizers.Tokenizer` over bytes with `END` as token 0; it loses nothing of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return tokenizer


def encode(tokenizer: Any, documents: list[Document]) -> Split:
    """The documents one after another, each followed by `END`."""
    # Text that spells a special token is text.
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch([d.text for d in documents])
    parts = [np.array(encoding.ids, np.uint16) for encoding in encodings]
    stops = np.array(list(itertools.accumulate(len(p) + 1 for p in parts)), np.int64) - 1
    zero = np.zeros(1, np.uint16)
    data = np.concatenate([piece for part in parts for piece in (part, zero)])
    return _split(data, stops, [d.name for d in documents])


def _split(data: np.ndarray, stops: np.ndarray, names: list[str]) -> Split:
    starts = [0, *(int(stop) + 1 for stop in stops[:-1])]
    spans = [Span(*each) for each in zip(names, starts, stops.tolist(), strict=True)]
    return Split(data=data, spans=tuple(spans))


def _make(cfg: DomainsConfig, path: pathlib.Path) -> None:
    domains = read_domains(cfg)
    documents = [[d for sides in domains.values() for d in sides[i]] for i in range(len(SIDES))]
    tokenizer = train_bpe(documents[0], cfg.vocab_size)
    size = tokenizer.get_vocab_size()
    check(size == cfg.vocab_size, f"the text gives {size} entries, not {cfg.vocab_size}")
    splits = {side: encode(tokenizer, docs) for side, docs in zip(SIDES, documents, strict=True)}
    arrays: dict[str, Any] = {side: split.data for side, split in splits.items()}
    for side, split in splits.items():
        arrays[f"{side}_stops"] = np.array([span.stop for span in split.spans], np.int64)
    names = {side: [span.name for span in split.spans] for side, split in splits.items()}
    arrays["names"] = np.str_(json.dumps(names))
    arrays["config"] = np.str_(json.dumps(dataclasses.asdict(cfg)))
    text = tokenizer.to_str().encode()
    _write(path.with_name("tokenizer.json"), lambda file: file.write(text))
    _write(path, lambda file: np.savez_compressed(file, **arrays))


def _write(path: pathlib.Path, put: Callable[[IO[bytes]], Any]) -> None:
    with writing("a corpus", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                put(file)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
