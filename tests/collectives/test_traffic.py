"""Bytes and seconds against counts by hand."""

import dataclasses
import doctest

import pytest

from moejax.collectives import traffic as module
from moejax.collectives.builders import (
    BUILDERS,
    bidirectional_ring_all_reduce,
    halving_doubling_all_reduce,
    hierarchical_all_reduce,
    native,
    recursive_doubling_all_reduce,
    ring_all_reduce,
)
from moejax.collectives.compose import with_codec
from moejax.collectives.traffic import Traffic, cost, traffic
from moejax.core.errors import InputError
from moejax.costmodel.links import Link

FAST, SLOW = (Link(alpha_s=a, beta_s_per_byte=1 / b) for a, b in ((1e-6, 1e10), (1e-5, 1e9)))


@dataclasses.dataclass(frozen=True)
class Half:
    def nbytes(self, n, itemsize):
        return n * itemsize // 2 + 1


def test_doctests():
    assert doctest.testmod(module).failed == 0


def test_codes_shorten_their_messages():
    axes = {"data": 2, "expert": 4}
    plain = hierarchical_all_reduce(axes)
    coded = traffic(with_codec(plain, Half(), "data"), 24)
    assert coded["expert"] == traffic(plain, 24)["expert"]
    assert coded["data"] == Traffic(messages=8, nbytes=8 * 13)
    with pytest.raises(InputError, match="chunk_bytes=6 is no multiple of 4 bytes"):
        traffic(with_codec(plain, Half()), 6)


@pytest.mark.parametrize("operation", ["reduce_scatter", "all_gather", "all_reduce", "all_to_all"])
def test_native_ones_move_what_the_best_schedule_does(operation):
    axes = {"data": 2, "expert": 4}
    name = "shifted_all_to_all" if operation == "all_to_all" else f"ring_{operation}"
    ours = traffic(BUILDERS[name].build(axes), 10)
    theirs = traffic(native(axes, operation), 10)
    assert sum(t.nbytes for t in ours.values()) == sum(t.nbytes for t in theirs.values())
    assert (theirs["data"].messages, theirs["expert"].messages) == (32, 24)


def test_steps_take_as_long_as_their_slowest_message():
    axes, chunk = {"data": 2, "expert": 4}, 4 * 2**20
    by_hand = 6 * FAST.seconds(chunk) + SLOW.seconds(chunk)
    links = {"data": SLOW, "expert": FAST}
    assert cost(hierarchical_all_reduce(axes), chunk, links) == pytest.approx(by_hand, rel=1e-12)
    # A flat ring crosses the slow link in every step.
    assert cost(ring_all_reduce(axes), chunk, links) == pytest.approx(14 * SLOW.seconds(chunk))


def test_the_textbook_crossovers():
    """Few steps for short messages, few bytes for long ones, two directions at half the bytes."""
    axes, links = {"expert": 8}, {"expert": FAST}

    def seconds(build, nbytes):
        schedule = build(axes)
        return cost(schedule, nbytes // schedule.num_chunks, links)

    short, long = 1024, 2**28
    doubling, ring = recursive_doubling_all_reduce, ring_all_reduce
    assert seconds(doubling, short) < seconds(halving_doubling_all_reduce, short)
    assert seconds(halving_doubling_all_reduce, short) < seconds(ring, short)
    assert seconds(ring, long) < seconds(doubling, long)
    both_ways = seconds(bidirectional_ring_all_reduce, long)
    assert both_ways == pytest.approx(seconds(ring, long) / 2, rel=1e-3)


def test_what_cannot_be_counted_is_refused():
    ring = ring_all_reduce({"expert": 4})
    with pytest.raises(InputError, match="chunk_bytes=-1"):
        traffic(ring, -1)
    with pytest.raises(InputError, match=r"no link over expert among \['data'\]"):
        cost(ring, 4, {"data": FAST})
    with pytest.raises(InputError, match="native all_reduce has no steps to price"):
        cost(native({"expert": 4}, "all_reduce"), 4, {"expert": FAST})
