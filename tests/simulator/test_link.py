import numpy as np
import pytest

from moejax.simulator.link import Link, clear_queue, wanted_order


def test_prefetches_stop_at_the_router_but_not_within_a_part():
    link = Link(parts=3, free_s=1.0, queue=(4, 2))
    link.send_prefetches(until_s=2.5, fetch_s=3.0)  # parts of 1 s start at 1.0 and 2.0
    assert (link.arrived, link.arrived_parts, link.free_s, link.busy_s) == (0, 2, 3.0, 2.0)
    link.occupy(2.5, 3.0)  # demand waits for the part
    assert (link.free_s, link.busy_s) == (6.0, 5.0)
    clear_queue(link)
    assert (link.queue, link.arrived, link.arrived_parts) == ((), 0, 0)


def test_a_firm_queue_goes_whole():
    link = Link(parts=1, queue=(4, 2), is_firm=True)
    link.send_prefetches(until_s=0.1, fetch_s=3.0)
    assert (link.arrived, link.free_s) == (2, 6.0)


def test_a_swap_goes_on_where_it_stopped():
    link = Link(parts=4)
    assert not link.send_swap(until_s=1.5, fetch_s=4.0)
    assert link.swap_parts == 2 and link.free_s == 2.0
    assert not link.send_swap(until_s=2.0, fetch_s=4.0)
    assert link.send_swap(until_s=9.0, fetch_s=4.0) and link.free_s == pytest.approx(4.0)


def test_order_of_demand():
    tokens, scores = np.array([1, 3, 1, 3, 0]), np.array([0.1, 0.2, 0.9, 0.1, 5.0])
    assert wanted_order(tokens, scores, tokens > 0).tolist() == [1, 3, 2, 0]
