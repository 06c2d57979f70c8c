"""The played schedule against FSMoE's closed form, by hand, and at its limits."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.costmodel.pipeline import (
    LayerTimes,
    Operation,
    choose_chunks,
    closed_form_seconds,
    pipelined_seconds,
)


def draw(rng):
    exchange, gather, experts = (
        Operation(alpha_s=rng.uniform(0.01, 0.5), work_s=rng.uniform(0.1, 20)) for _ in range(3)
    )
    return LayerTimes(
        dispatch=exchange, combine=exchange, gather=gather, scatter=gather, experts=experts
    )


def test_never_later_than_the_closed_form_and_mostly_equal():
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(200):
        times = draw(rng)
        ratios += [
            pipelined_seconds(times, r) / closed_form_seconds(times, r) for r in (1, 2, 4, 8)
        ]
    assert max(ratios) <= 1 + 1e-9 and np.median(ratios) == pytest.approx(1) and min(ratios) > 0.8


def test_one_chunk_takes_the_sum_of_all():
    times = draw(np.random.default_rng(1))
    parts = (times.dispatch, times.gather, times.experts, times.scatter, times.combine)
    assert pipelined_seconds(times, 1) == pytest.approx(sum(part.seconds(1) for part in parts))


def test_two_chunks_by_hand():
    exchange, experts = Operation(alpha_s=1.0, work_s=2.0), Operation(work_s=8.0)
    times = LayerTimes(dispatch=exchange, combine=exchange, experts=experts)
    # Exchanges of 2, experts of 4: the second chunk computes from 6 to 10, and is back at 12.
    assert pipelined_seconds(times, 2) == pytest.approx(12.0)
    # No less than the busiest resource, whatever the number of chunks.
    assert pipelined_seconds(times, 8) >= 8.0


def test_choice_is_the_best_of_all_candidates():
    rng = np.random.default_rng(2)
    for _ in range(20):
        times = draw(rng)
        best, seconds = choose_chunks(times)
        assert seconds[best] == min(pipelined_seconds(times, r) for r in seconds)
    free = Operation(alpha_s=0.5)
    assert choose_chunks(LayerTimes(dispatch=free, experts=free, combine=free))[0] == 1
    cheap, long = Operation(alpha_s=1e-6, work_s=1.0), Operation(alpha_s=1e-6, work_s=9.0)
    assert choose_chunks(LayerTimes(dispatch=cheap, experts=long, combine=cheap))[0] == 8


def test_no_chunk_and_no_candidate_are_refused():
    times = draw(np.random.default_rng(3))
    with pytest.raises(InputError, match="num_chunks=0 must be at least 1"):
        pipelined_seconds(times, 0)
    with pytest.raises(InputError, match="no candidate"):
        choose_chunks(times, ())
