"""Windows of every domain: of training files to fit on, of other files to judge by.

Axis letters:
    N  windows    S  tokens of a window
"""

import numpy as np

from moejax.core.errors import check
from moejax.data.bpe import spans_by_domain
from moejax.data.text import Split


def fit_windows(split: Split, tokens: int, window: int, seed: int) -> dict[str, np.ndarray]:
    """int32 [N, S] by domain: random places of its training files."""
    chosen = {}
    for place, (domain, spans) in enumerate(spans_by_domain(split).items()):
        first, last = spans[0].start, spans[-1].stop - window
        check(last > first, f"domain {domain}: less than one window={window} to fit on")
        starts = np.random.default_rng((seed, place)).integers(first, last, tokens // window)
        chosen[domain] = split.data[starts[:, None] + np.arange(window)].astype(np.int32)
    return chosen


def heldout_starts(split: Split, tokens: int, window: int, seed: int) -> dict[str, np.ndarray]:
    """int64 [N] by domain: starts of windows inside held-out files, disjoint, in order.

    A random choice of all that there are, at most `tokens` in each domain. Behind each window lies
    one more token of its file or the file's end, so that all of its tokens have a successor.
    """
    chosen = {}
    for place, (domain, spans) in enumerate(spans_by_domain(split).items()):
        starts = [s for span in spans for s in range(span.start, span.stop - window + 1, window)]
        check(len(starts) > 0, f"domain {domain}: no held-out file has window={window} tokens")
        order = np.random.default_rng((seed, place)).permutation(len(starts))
        chosen[domain] = np.sort(np.array(starts)[order[: tokens // window]])
    return chosen


def windows_at(split: Split, starts: np.ndarray, window: int) -> np.ndarray:
    """int32 [N, S]."""
    return split.data[starts[:, None] + np.arange(window)].astype(np.int32)
