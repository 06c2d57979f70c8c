"""Where the batches of a run come from: a function of (seed, step), asked for by rows.

A process of several asks only for the rows of the global batch that its own devices hold, so what a
step sees does not depend on how many processes there are, and a resumed run has no iterator to
restore.

Axis letters:
    N  bytes or tokens of the corpus    B  sequences in a global batch    S  positions
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from moejax.core.errors import check
from moejax.data.text import batch


class Source(Protocol):
    """Batches by step."""

    @property
    def crc32(self) -> int:
        """Of all data: a run does not continue on another corpus."""
        ...

    def batches(self, step: int, rows: np.ndarray) -> Iterator[np.ndarray]:
        """int32 [len(rows), S + 1] of the batch of `step`, then of the next one, without end."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RandomWindows:
    """Windows at random places, with replacement; read when asked for."""

    data: np.ndarray  # uint8 [N]
    seed: int
    batch_size: int
    seq_len: int

    def __post_init__(self):
        have, want = len(self.data), self.batch_size * (self.seq_len + 1)
        check(have >= want, f"corpus too small: {have} training bytes, one batch wants {want}")

    @functools.cached_property
    def crc32(self) -> int:
        return zlib.crc32(self.data.tobytes())

    def batches(self, step: int, rows: np.ndarray) -> Iterator[np.ndarray]:
        shape = dict(batch_size=self.batch_size, seq_len=self.seq_len)
        for at in itertools.count(step):
            yield batch(self.data, self.seed, at, **shape)[rows]
