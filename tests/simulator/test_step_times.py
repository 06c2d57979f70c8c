"""Times by hand, order between plans, bounds, wrong input."""

import dataclasses

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.costmodel.hardware import get_machine
from moejax.costmodel.miss import expert_cost
from moejax.simulator.plans import FIXED, Plan, ablation_plans, candidate_plans
from moejax.simulator.step_times import simulate
from moejax.simulator.workload import lanes_of_trace, make_workload
from tests.simulator.test_stack import random_trace
from tests.simulator.test_workload import FACTS

MACHINE = get_machine("A100-PCIe4")


@pytest.fixture(scope="module", params=[1, 4])
def work(request):
    trace = random_trace(8, layers=3, experts=16, lengths=(20, 24, 22, 20), skip=0)
    trace = dataclasses.replace(trace, expert_bytes=np.full(3, 10**7))
    lanes = lanes_of_trace(trace, request.param, max_steps=20)
    halves = (slice(0, 10), slice(10, 20))
    return make_workload(lanes, *halves, recall=0.8, **(FACTS | {"dense_bytes": 1e8}))


def test_on_demand_and_all_host_by_hand(work):
    cost = expert_cost(MACHINE, 10**7)
    attention_s = 1e8 / MACHINE.chip.hbm_bytes_per_s
    distinct = np.sum(work.tokens > 0, axis=2)
    moved = simulate(work, MACHINE, FIXED["on_demand"], slots=3)
    last = cost.device_s(1)
    expected = np.sum(attention_s + distinct * cost.fetch_s + last, axis=1)
    np.testing.assert_allclose(moved.seconds, expected)
    np.testing.assert_allclose(moved.link_s, distinct.sum(1) * cost.fetch_s)
    np.testing.assert_array_equal(moved.misses, distinct.sum(1))
    host = simulate(work, MACHINE, FIXED["all_host"], slots=3)
    busy = np.where(work.tokens > 0, cost.host_s(work.tokens), 0).sum((1, 2))
    np.testing.assert_allclose(host.seconds, 3 * attention_s + busy)
    np.testing.assert_allclose(host.host_s, busy)
    np.testing.assert_array_equal(host.on_host, distinct.sum(1))


@pytest.mark.parametrize(
    "plan", [*candidate_plans(), *ablation_plans()], ids=lambda plan: plan.name
)
def test_no_plan_beats_its_bounds(work, plan):
    times = simulate(work, MACHINE, plan, slots=12)
    assert (times.seconds >= times.fractional_bound_s * (1 - 1e-9)).all()
    if plan.wire == 1 and plan.serve == "whole" and plan.prefetch == "none":
        np.testing.assert_allclose(times.seconds, times.integral_bound_s, rtol=0.15)
    assert (times.integral_bound_s >= times.fractional_bound_s * (1 - 1e-9)).all()
    assert (times.host_s <= times.seconds).all() and (times.misses <= times.lookups).all()
    assert times.link_s.sum() <= times.seconds.sum() * 1.05  # firm ones may outlast the last step
    assert (times.on_host <= times.misses + 1e-9).all() and (times.on_host >= -1e-9).all()


def test_a_split_is_faster_than_either_and_everything_resident_needs_neither(work):
    def seconds(slots=12, **kwargs):
        plan = Plan(name="", **({"keep": "static"} | kwargs))
        return simulate(work, MACHINE, plan, slots=slots).seconds.sum()

    columns, whole = seconds(serve="columns"), seconds(serve="whole")
    assert columns <= whole <= min(seconds(serve="fetch"), seconds(serve="host"))
    assert columns < 0.97 * whole
    resident = simulate(work, MACHINE, Plan(name="", serve="fetch", keep="static"), slots=48)
    assert resident.misses.sum() == 0 and resident.link_s.sum() == 0
    np.testing.assert_allclose(resident.seconds, resident.fractional_bound_s)


def test_perfect_predictions_in_parts_do_no_harm_and_firm_wrong_ones_do(work):
    perfect = dataclasses.replace(work, predicted=work.tokens, precision=np.ones(16))
    never = np.where(work.tokens > 0, 0, 1)
    wrong = dataclasses.replace(work, predicted=never, precision=np.zeros(16))
    blind = Plan(name="", serve="columns", keep="static", parts=16)
    ahead = dataclasses.replace(blind, prefetch="slack")
    base = simulate(work, MACHINE, blind, slots=12)
    good, bad = (simulate(w, MACHINE, ahead, slots=12) for w in (perfect, wrong))
    assert good.seconds.sum() < 0.99 * base.seconds.sum() and good.wasted_bytes.sum() == 0
    assert bad.seconds.sum() < 1.02 * base.seconds.sum() and bad.wasted_bytes.sum() > 0
    firm = dataclasses.replace(FIXED["next_gate"], keep="static")
    moved = dataclasses.replace(FIXED["lru"], keep="static")
    lost = simulate(wrong, MACHINE, firm, slots=12).seconds.sum()
    assert lost > 1.2 * simulate(work, MACHINE, moved, slots=12).seconds.sum()


def test_wrong_input_is_refused(work):
    with pytest.raises(InputError, match="2 slots for 3 layers; the minimum is one each"):
        simulate(work, MACHINE, FIXED["lru"], slots=2)
    other = dataclasses.replace(work, predicted=work.predicted[:, :2])
    with pytest.raises(InputError, match="a trace of another shape: tokens .10, 3, 16., predict"):
        simulate(other, MACHINE, FIXED["lru"], slots=12)
