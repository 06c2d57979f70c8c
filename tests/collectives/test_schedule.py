import dataclasses
import doctest

from moejax.collectives import schedule as module
from moejax.collectives.builders import ring_all_gather, shifted_all_to_all
from moejax.collectives.schedule import Schedule, Step, Transfer, coordinates, crossed_axis


def test_doctests():
    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 3) == (0, True)


def test_equal_data_is_equal_and_hashes_equal():
    one, other = shifted_all_to_all({"expert": 4}), shifted_all_to_all({"expert": 4})
    assert one == other and one is not other and len({one, other}) == 1
    assert one != shifted_all_to_all({"data": 4})
    assert one != dataclasses.replace(one, steps=one.steps[:-1])


def test_the_order_of_transfers_means_nothing():
    a, b = Transfer(0, 1, (0,), rail=1), Transfer(1, 0, (1,))
    assert Step((a, b)) == Step((b, a))
    assert Step((a, b)).rails() == ((b,), (a,))
    # The order of steps, and of chunks in a message, does.
    schedule = ring_all_gather({"expert": 4})
    assert dataclasses.replace(schedule, steps=schedule.steps[::-1]) != schedule
    assert Transfer(0, 1, (0, 1)) != Transfer(0, 1, (1, 0))


def test_lists_are_taken_and_still_hash():
    written = Schedule(
        axes=["expert"],
        sizes=[2],
        num_chunks=2,
        start=[[0], [1]],
        end=[[1], [0]],
        steps=[Step([Transfer(1, 0, [1]), Transfer(0, 1, [0])])],
    )
    assert len({written}) == 1
    assert str(written).splitlines()[1] == "  0: 0->1 copy 0, 1->0 copy 1"


def test_ranks_are_row_major_and_links_the_slowest():
    assert [coordinates(rank, (2, 3)) for rank in range(6)] == [
        (o, i) for o in range(2) for i in range(3)
    ]
    assert crossed_axis(2, 2, (2, 4)) is None
    assert crossed_axis(2, 3, (2, 4)) == 1
    assert crossed_axis(2, 7, (2, 4)) == 0
