"""N-gram models of tokens from a large vocabulary: what a language model of tokens must beat.

Witten-Bell interpolation: `p(y | c) = (count(c, y) + d(c) p(y | c')) / (count(c) + d(c))` with d(c)
the number of different tokens seen after c and c' the context without its oldest token; under the
unigram lies the uniform distribution. Only what was seen is stored. (`moejax.data.ngram` has tables
of bytes.) Contexts are the true previous tokens, token 0 before the first of all.

Axis letters:
    N  tokens    V  vocabulary
"""

import dataclasses

import numpy as np

from moejax.core.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Level:
    """Counts of one order: sorted codes of what was seen, and sums over what follows a context."""

    codes: np.ndarray  # int64, of context and token
    counts: np.ndarray
    contexts: np.ndarray  # int64
    totals: np.ndarray
    different: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenNGram:
    """Counts of the orders 1 ... `order`."""

    vocab_size: int
    levels: tuple[_Level, ...]


def fit_token_ngram(data: np.ndarray, order: int, *, vocab_size: int) -> TokenNGram:
    """Counts `data` [N], integers below `vocab_size`.

    Cost: a sort of N numbers for every order.
    """
    check(1 <= order <= 3, f"order={order} must be 1, 2 or 3")
    check(len(data) >= 1, "an n-gram wants at least one token")
    high = int(data.max())
    check(high < vocab_size, f"token {high} is not below vocab_size={vocab_size}")
    levels = []
    for n in range(1, order + 1):
        codes, counts = np.unique(_codes(data, n, vocab_size), return_counts=True)
        contexts, first = np.unique(codes // vocab_size, return_index=True)
        different = np.diff(np.append(first, len(codes)))
        totals = np.add.reduceat(counts, first)
        levels.append(
            _Level(
                codes=codes, counts=counts, contexts=contexts, totals=totals, different=different
            )
        )
    return TokenNGram(vocab_size=vocab_size, levels=tuple(levels))


def bits_per_token(model: TokenNGram, data: np.ndarray, positions: np.ndarray) -> list[float]:
    """Mean bits of the tokens at `positions` of `data` [N] under order 1, 2, ... of the model."""
    p = np.full(len(positions), 1 / model.vocab_size)
    bits = []
    for n, level in enumerate(model.levels, start=1):
        codes = _codes(data, n, model.vocab_size)[positions]
        hits = _look_up(level.codes, level.counts, codes)
        total = _look_up(level.contexts, level.totals, codes // model.vocab_size)
        different = _look_up(level.contexts, level.different, codes // model.vocab_size)
        seen = total > 0
        mixed = (hits + different * p) / np.maximum(total + different, 1)
        p = np.where(seen, mixed, p)
        bits.append(float(-np.log2(p).mean()))
    return bits


def _codes(data: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """int64 [N]: each token with the order - 1 before it as one number."""
    padded = np.concatenate([np.zeros(order - 1, np.int64), data.astype(np.int64)])
    codes = padded[: len(data)]
    for k in range(1, order):
        codes = codes * vocab_size + padded[k : k + len(data)]
    return codes


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is not among the sorted `keys`."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
