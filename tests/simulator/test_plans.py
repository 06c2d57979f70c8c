import pytest

from moejax.core.errors import InputError
from moejax.simulator.plans import FIXED, ablation_plans, candidate_plans, slots_of_fraction


def test_the_planner_may_choose_every_fixed_plan_and_names_are_unique():
    plans = candidate_plans()
    assert set(FIXED.values()) < set(plans)
    assert len({plan.name for plan in plans}) == len(plans)
    assert len(FIXED) == 9 and len(set(FIXED.values())) == 9


def test_no_plan_of_the_planner_is_lossy_and_only_one_of_the_ablation():
    assert all(plan.wire == 1.0 for plan in candidate_plans())
    assert ["lossy" in plan.name for plan in ablation_plans() if plan.wire < 1] == [True]


def test_slots_of_a_share_of_all_experts():
    assert slots_of_fraction(0.25, 48, 128) == 1536
    with pytest.raises(InputError, match="0.1% is 6 slots for 48 layers; .* one each, 0.781%"):
        slots_of_fraction(0.001, 48, 128)
