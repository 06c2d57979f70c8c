"""Windows by domain: training files to fit on, others to judge by, none across a file's end."""

import numpy as np
import pytest

from experiments.hidden_steps.text import fit_windows, heldout_starts, windows_at
from moejax.core.errors import InputError
from moejax.data.text import Span, Split

SPANS = (Span("a/0", 0, 10), Span("a/1", 11, 30), Span("b/0", 31, 100))
SPLIT = Split(data=np.arange(101, dtype=np.uint16), spans=SPANS)


def test_fit_windows_stay_in_their_domain():
    windows = fit_windows(SPLIT, tokens=80, window=8, seed=0)
    assert {name: w.shape for name, w in windows.items()} == {"a": (10, 8), "b": (10, 8)}
    assert windows["a"].max() < 30 and windows["b"].min() >= 31
    for one in windows.values():
        assert one.dtype == np.int32 and (np.diff(one, axis=1) == 1).all()


def test_heldout_windows_lie_inside_files_and_do_not_overlap():
    starts = heldout_starts(SPLIT, tokens=64, window=8, seed=0)
    assert starts["a"].tolist() == [0, 11, 19]  # all that there are
    assert len(starts["b"]) == 8 and ((starts["b"] - 31) % 8 == 0).all()
    assert starts["b"].max() + 8 <= 100
    np.testing.assert_array_equal(windows_at(SPLIT, np.array([3, 50]), 2), [[3, 4], [50, 51]])


def test_a_domain_of_short_files_is_named():
    short = Split(data=SPLIT.data, spans=(Span("a/0", 0, 10), Span("b/0", 11, 13)))
    with pytest.raises(InputError, match="domain b: no held-out file has window=8"):
        heldout_starts(short, tokens=64, window=8, seed=0)
    with pytest.raises(InputError, match="domain b: less than one window=8"):
        fit_windows(short, tokens=64, window=8, seed=0)
