import dataclasses

import numpy as np
import pytest

from moejax.costmodel.hardware import get_machine
from moejax.simulator.plan_search import choose_plan, run_case, split_steps
from moejax.simulator.plans import FIXED, candidate_plans
from moejax.simulator.step_times import simulate
from moejax.simulator.workload import lanes_of_trace
from tests.simulator.test_stack import random_trace
from tests.simulator.test_workload import FACTS


@pytest.fixture(scope="module")
def parts():
    trace = random_trace(9, layers=2, experts=16, lengths=(24,), skip=0)
    lanes = dataclasses.replace(lanes_of_trace(trace, 1), expert_bytes=np.full(2, 10**7))
    return split_steps(lanes, recall=0.8, **FACTS)


def test_scored_steps_are_not_those_that_were_chosen_by(parts):
    train, test = parts
    assert len(train.tokens) == 6 and len(test.tokens) == 12
    np.testing.assert_array_equal(test.past - train.past, train.tokens.sum(0))


def test_the_choice_is_the_cheapest_on_the_first_part(parts):
    train, test = parts
    machine = get_machine("v5e-host")
    chosen = choose_plan(train, machine, slots=8)
    seconds = {
        plan.name: simulate(train, machine, plan, slots=8).seconds.sum()
        for plan in candidate_plans()
    }
    assert seconds[chosen.name] == min(seconds.values())
    assert choose_plan(train, machine, slots=8, plans=[FIXED["lru"]]) == FIXED["lru"]
    case = run_case(train, test, machine, slots=8)
    assert case.chosen == chosen and list(case.fixed) == list(FIXED)
    assert case.over_fixed("on_demand") > 1.05
    assert case.seconds == pytest.approx(
        simulate(test, machine, chosen, slots=8).seconds.mean(), rel=1e-12
    )
