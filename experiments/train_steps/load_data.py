"""The text of a run, as its config says: bytes of files, or byte-pair tokens of several domains."""

import dataclasses
import pathlib

from configs.run import RunConfig
from moejax.core.errors import InputError, check
from moejax.data.bpe import load_tokens
from moejax.data.domains import DomainsConfig
from moejax.data.text import Corpus, TextConfig, load_corpus

BYTES = 256


def load_data(cfg: RunConfig, workdir: pathlib.Path) -> Corpus:
    """Both sides; tokens are made in `workdir` once. `InputError` where the model has others."""
    tokens = cfg.data.vocab_size if isinstance(cfg.data, DomainsConfig) else BYTES
    size = cfg.model.vocab_size
    check(size == tokens, f"model.vocab_size={size}, but the data has {tokens} different tokens")
    if isinstance(cfg.data, DomainsConfig):
        return load_tokens(cfg.data, workdir)
    return load_corpus(cfg.data)


def with_path(data: TextConfig | DomainsConfig, path: str) -> TextConfig:
    """The text at `path` instead; `InputError` for a config that reads several domains."""
    if isinstance(data, DomainsConfig):
        raise InputError(f"--data={path}: this config reads text of several domains, no path")
    return dataclasses.replace(data, path=path)
