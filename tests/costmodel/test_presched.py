"""Plans against every assignment of few experts; the sweep costs one pass."""

import itertools

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.costmodel.presched import (
    LayerWork,
    bound_s,
    plan_two_layers,
    serve_columns,
    serve_whole,
)


def random_work(rng, n):
    host = np.sort(rng.uniform(0.2, 3.0, n))[::-1]
    device, expert, delay = rng.uniform(0, [3.0, 0.4, 1.0])
    return LayerWork(
        host_s=host,
        fetch_s=float(rng.uniform(0.3, 2.0)),
        expert_s=float(expert),
        device_s=float(device),
        link_delay_s=float(delay),
    )


def layer_s(work, moved, host, already=0):
    """End of a layer, event by event: transfers one by one, products as their experts arrive."""
    device = work.device_s + already * work.expert_s
    for i in range(moved):
        device = max(device, work.link_delay_s + (i + 1) * work.fetch_s) + work.expert_s
    return max(device, sum(host))


def every_layer(work, experts, already=0):
    """(seconds, moved) of every division of `experts` between link and host."""
    for on_link in itertools.product((True, False), repeat=len(experts)):
        host = [work.host_s[e] for e, moved in zip(experts, on_link, strict=True) if not moved]
        yield layer_s(work, sum(on_link), host, already), sum(on_link)


@pytest.mark.parametrize("seed", range(60))
def test_the_sweep_finds_the_best_of_all_assignments(seed):
    rng = np.random.default_rng(seed)
    now, upcoming = (random_work(rng, n) for n in rng.integers(0, 5, 2))
    attention, lanes = float(rng.uniform(0, 2)), int(rng.integers(0, 5))
    m = len(upcoming.host_s)
    best = np.inf
    for now_s, moved in every_layer(now, range(len(now.host_s))):
        link = now.link_delay_s + moved * now.fetch_s
        for prefetched in itertools.product((True, False), repeat=m):
            y = sum(prefetched)
            if y > lanes or (y and link + y * upcoming.fetch_s > now_s + attention + 1e-9):
                continue
            rest = [e for e in range(m) if not prefetched[e]]
            for next_s, _ in every_layer(upcoming, rest, already=y):
                best = min(best, now_s + attention + next_s)
    plan = plan_two_layers(now, upcoming, attention_s=attention, lanes=lanes)
    assert plan.now_s + attention + plan.next_s == pytest.approx(best, abs=1e-9)
    assert plan.prefetched <= min(lanes, m)
    assert plan.now_s == pytest.approx(
        layer_s(now, plan.moved, now.host_s[plan.moved :]), abs=1e-12
    )


@pytest.mark.parametrize("seed", range(30))
def test_columns_lie_between_the_bound_and_whole_experts(seed):
    rng = np.random.default_rng(seed)
    work = random_work(rng, int(rng.integers(1, 7)))
    whole, columns = serve_whole(work), serve_columns(work)
    assert whole.seconds == pytest.approx(min(every_layer(work, range(len(work.host_s))))[0])
    assert bound_s(work) - 1e-12 <= columns.seconds <= whole.seconds
    for share in np.linspace(0, 1, 21):  # no share of any expert does better
        for x in range(len(work.host_s)):
            link = work.link_delay_s + (x + share) * work.fetch_s + work.expert_s
            device = work.device_s + (x + share) * work.expert_s
            host = work.host_s[x:].sum() - share * work.host_s[x]
            first = layer_s(work, x, [])
            assert columns.seconds <= max(link, device, host, first) + 1e-12


def test_with_free_devices_columns_reach_the_bound():
    work = LayerWork(host_s=np.array([2.0, 2.0, 1.0]), fetch_s=1.5)
    assert serve_columns(work).seconds == pytest.approx(bound_s(work))
    assert bound_s(work) == pytest.approx(1.5 + 1.5 * (3.0 - 1.5) / 3.5)
    assert serve_whole(work).seconds == 3.0


def test_prefetches_only_what_the_link_has_time_for():
    busy = LayerWork(host_s=np.array([]), fetch_s=1.0, device_s=2.5)
    upcoming = LayerWork(host_s=np.full(5, 10.0), fetch_s=1.0)
    plan = plan_two_layers(busy, upcoming, attention_s=0.6)
    assert (plan.moved, plan.prefetched) == (0, 3)
    assert plan_two_layers(busy, upcoming, attention_s=0.6, lanes=1).prefetched == 1


def test_host_times_must_be_sorted():
    with pytest.raises(InputError, match="are not longest first"):
        LayerWork(host_s=np.array([1.0, 2.0]), fetch_s=1.0)
