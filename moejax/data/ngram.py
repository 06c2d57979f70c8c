"""Bigram and trigram models of bytes with additive smoothing: what a language model must beat.

`p(y | context) = (count(context, y) + a) / (count(context) + 256 a)`, counted on the training
bytes. Contexts are the true previous bytes, so an n-gram looks past the edges of the windows that a
neural model is scored on; before the first byte of all there are NUL separators.
"""

import dataclasses

import numpy as np

from moejax.core.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NGram:
    """Counts of `order` consecutive bytes; row = the first order - 1 of them, big-endian."""

    order: int
    counts: np.ndarray  # int64 [256 ** (order - 1), 256]
    smoothing: float


def fit_ngram(data: np.ndarray, order: int, *, smoothing: float = 0.1) -> NGram:
    """Counts `data` uint8 [N].

    Cost: order 3 takes about a second for 30 MB and holds 8 N + 128 MiB bytes meanwhile.
    """
    check(1 <= order <= 3, f"order={order} must be 1, 2 or 3")
    check(len(data) >= order, f"an n-gram of order={order} wants {order} bytes, got {len(data)}")
    counts = np.bincount(_codes(data, order), minlength=256**order)
    return NGram(order=order, counts=counts.reshape(-1, 256), smoothing=smoothing)


def bits_per_byte(model: NGram, data: np.ndarray, positions: np.ndarray) -> float:
    """Mean bits of the bytes at `positions` of `data` uint8 [N], given the bytes before them."""
    padded = np.concatenate([np.zeros(model.order - 1, np.uint8), data])
    row, byte = np.divmod(_codes(padded, model.order)[positions], 256)
    hits = model.counts[row, byte]
    totals = model.counts.sum(1)[row]
    p = (hits + model.smoothing) / (totals + 256 * model.smoothing)
    return float(-np.log2(p).mean())


def scored_positions(starts: np.ndarray, seq_len: int) -> np.ndarray:
    """The bytes that windows of `seq_len` + 1 at `starts` predict: i + 1 ... i + seq_len."""
    return (starts[:, None] + np.arange(1, seq_len + 1)).reshape(-1)


def _codes(data: np.ndarray, order: int) -> np.ndarray:
    """int64 [N - order + 1]: each run of `order` bytes as one number."""
    codes = data[: len(data) - order + 1].astype(np.int64)
    for k in range(1, order):
        codes = codes * 256 + data[k : len(data) - order + 1 + k]
    return codes
