"""Epochs over a corpus: disjoint windows, shuffled anew every time, read ahead of the training.

The order is grain's index shuffle, a permutation that is computed, not stored, so any step of any
epoch is found in constant time.

Axis letters:
    N  bytes or tokens of the corpus    B  sequences in a global batch    S  positions
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator

import grain
import numpy as np

from moejax.core.errors import check, check_seed


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ShuffledWindows:
    """A `Source` of every window once per epoch.

    Attributes:
        read_ahead: batches that wait in memory, read by a thread of grain's.
    """

    data: np.ndarray  # uint8 [N]
    seed: int
    batch_size: int
    seq_len: int
    read_ahead: int = 8

    def __post_init__(self):
        check_seed(self.seed)
        check(self.read_ahead >= 1, f"read_ahead={self.read_ahead} must be at least 1")
        check(
            self.num_windows >= self.batch_size,
            f"corpus too small: {len(self.data)} training bytes are {self.num_windows} windows of "
            f"seq_len={self.seq_len}, one batch wants batch_size={self.batch_size}",
        )

    @property
    def num_windows(self) -> int:
        """Windows in an epoch. Their targets do not overlap; what does not fill one is left out."""
        return max(0, (len(self.data) - 1) // self.seq_len)

    @functools.cached_property
    def crc32(self) -> int:
        # Not that of `RandomWindows`: in another order it is another run.
        return zlib.crc32(b"shuffled windows", zlib.crc32(self.data.tobytes()))

    def batches(self, step: int, rows: np.ndarray) -> Iterator[np.ndarray]:
        starts = grain.MapDataset.range(self.num_windows).shuffle(self.seed).repeat()

        def read(at: int) -> np.ndarray:
            chosen = np.array([starts[at * self.batch_size + row] for row in rows.tolist()])
            index = chosen[:, None] * self.seq_len + np.arange(self.seq_len + 1)
            return self.data[index].astype(np.int32)

        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self.read_ahead)
        steps = grain.MapDataset.range(step, np.iinfo(np.int32).max)
        iterator = iter(steps.map(read).to_iter_dataset(ahead))
        try:
            yield from iterator
        finally:
            iterator.close()
