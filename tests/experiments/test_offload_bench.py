"""The benchmark of policies: figures of a planned one, and what it refuses."""

import json

import pytest

from experiments import offload_bench
from experiments.offload_steps.policies import POLICIES, plan_json, read_plan
from moejax.core.errors import InputError
from moejax.costmodel.miss import MissCosts
from tests.experiments.test_routing_consistency import run_main

COSTS = MissCosts(fetch_s=1e-3, host_read_s=2e-3, host_row_s=1e-3)
REFUSED = {
    "--policy=lru,guess": "policy 'guess' is not one of on_demand, lru",
    "--batch=1,x": "--batch=1,x is not a list of positive numbers",
    "--device_budget=none": "--device_budget=none offloads nothing",
    "--shape=huge": "shape 'huge' is not one of",
    "--plan=absent.json": "--plan=absent.json: No such file or directory",
    "--fitted=absent": "absent/predictor.json",
    "--prompt_file=text": "--prompt_file wants a --model",
}


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_input_is_refused_in_one_line(line):
    with pytest.raises(InputError) as error:
        run_main(offload_bench, line)
    assert REFUSED[line] in str(error.value) and "\n" not in str(error.value)


def test_a_plan_is_run_and_reported(tmp_path):
    """Fetches of LRU at half the budget: counts as simulated, tokens as resident."""
    plan = tmp_path / "plan.json"
    plan.write_text(plan_json(POLICIES["lru"], COSTS, {"why": "test"}))
    line = "--shape=tiny --batch=2 --timed_steps=5 --prompt_tokens=4 --device_budget=50%"
    run_main(offload_bench, f"{line} --plan={plan} --json={tmp_path}/out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    found = report["figures"]["batch"]["2"]
    assert report["rung"] == "time" and report["figures"]["chosen_policy"] == {"2": "lru"}
    assert found["num_slots"] == 7  # half of 16, less the one that is on its way
    (one,) = found["policies"].values()
    assert one["same_tokens_as_resident"] and one["host_computed_experts"] == 0
    assert one["wasted_bytes_per_token"] == 0 < one["moved_bytes_per_token"]
    assert one["predicted_hit_rate"] == pytest.approx(one["hit_rate"], abs=0.2)
    assert one["bound_ms"] > found["resident_ms"]
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_a_lossy_policy_runs_only_where_it_is_named():
    (lossy,) = [one for one in POLICIES.values() if one.is_lossy]
    assert lossy.name == "hobbit" and not lossy.is_exact
    assert set(POLICIES) - {"hobbit"} == set(offload_bench.POLICY.default)
    about = {"same_tokens_as_resident": False, "lossy": True, "low_precision_fetches": 2.0}
    assert offload_bench.describe_tokens(about) == "no (lossy: 2.0 misses in few bits)"


def test_plans_are_read_back_or_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan_json(POLICIES["columns"], COSTS, {}))
    assert read_plan(str(path)) == (POLICIES["columns"], COSTS)
    wrong = path.read_text().replace('"divide"', '"guess"')
    for text, reason in ((wrong, "serve='guess'"), ("{}", "not a plan"), ("[", "Expecting")):
        path.write_text(text)
        with pytest.raises(InputError, match=reason):
            read_plan(str(path))


def test_a_budget_is_divided_into_slots_of_parts():
    config = POLICIES["columns"].config(10, 2, 8, COSTS)
    assert (config.num_slots, config.column_parts, config.costs.fetch_s) == (40, 4, 0.25e-3)
    ahead = POLICIES["next_gate"].config(10, 2, 8, COSTS)
    assert (ahead.num_slots, ahead.prefetch_lanes, ahead.costs) == (6, 4, None)
    alone = POLICIES["on_demand"].config(10, 2, 8, COSTS)
    assert (alone.num_slots, alone.quota) == (8, "shared")
