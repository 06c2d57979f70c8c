"""What rings send: the fewest bytes possible, and over slow axes the fewest of those."""

import pytest

from moejax.collectives.builders import BUILDERS
from moejax.collectives.rings import (
    bidirectional_ring_all_reduce,
    hierarchical_all_reduce,
    ring_all_gather,
    ring_all_reduce,
    torus_all_reduce,
)
from moejax.collectives.traffic import Traffic, traffic
from moejax.core.errors import InputError


def test_rings_step_once_per_other_rank():
    assert traffic(ring_all_gather({"expert": 8}), 10) == {
        "expert": Traffic(messages=56, nbytes=560)
    }
    # A row-major ring over two axes crosses the outer one where a row ends.
    crossed = traffic(ring_all_gather({"data": 2, "expert": 4}), 10)
    assert (crossed["data"].messages, crossed["expert"].messages) == (14, 42)


def test_hierarchies_send_little_over_the_slow_axis():
    """Of 24 units per rank: 1 / 4 of them are left to cross `data`, 2 (O - 1) / O times each."""
    axes = {"data": 3, "expert": 4}
    moved = traffic(hierarchical_all_reduce(axes), 2)
    assert moved["data"].nbytes == 12 * 24 // 4 * 2 * 2 // 3
    assert moved["expert"].nbytes == 12 * 24 * 2 * 3 // 4
    flat = traffic(ring_all_reduce(axes), 2)
    assert moved["data"].nbytes + moved["expert"].nbytes == sum(t.nbytes for t in flat.values())


def test_two_outer_ranks_swap_in_one_step():
    schedule = hierarchical_all_reduce({"data": 2, "expert": 4})
    assert (len(schedule.steps), schedule.num_chunks) == (3 + 1 + 3, 4)
    # 8 ranks of 24 units: as many bytes as the halves of a ring, in half the messages.
    assert traffic(schedule, 6)["data"] == Traffic(messages=8, nbytes=8 * 6)


@pytest.mark.parametrize(
    "build, rails", [(bidirectional_ring_all_reduce, 2), (torus_all_reduce, 2)]
)
def test_two_rails_carry_half_each(build, rails):
    axes = {"data": 4, "expert": 4}
    schedule = build(axes)
    assert {len(step.rails()) for step in schedule.steps} == {rails}
    widths = {
        tuple(sum(len(one.chunks) for one in rail) for rail in step.rails())
        for step in schedule.steps
    }
    assert all(a == b for a, b in widths)
    assert sum(t.nbytes for t in traffic(schedule, 1).values()) == 16 * 2 * 15 * 2


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    "axes, message",
    [
        ({}, "at least one axis"),
        ({"data": 2, "expert": 0}, "axis expert=0 must be a whole number above 0"),
        ({"data": 4.0, "expert": 1}, "axis data=4.0 must be a whole number"),
    ],
)
def test_no_builder_takes_half_a_rank(name, axes, message):
    with pytest.raises(InputError, match=message if name != "two_level_all_to_all" else "ax"):
        BUILDERS[name].build(axes)
