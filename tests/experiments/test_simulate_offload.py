"""The program on a recorded run, and what it refuses. Its figures are checked where they arise."""

import json

import pytest

from moejax.simulator.plans import FIXED
from tests.experiments.test_routing_consistency import refusals, run_child

REFUSED = {
    "--hardware=abacus": "hardware row 'abacus' is not one of RTX4090-PCIe3",
    "--batches=1,0": "--batches=1,0: not positive whole numbers",
    "--experts_on_device=8GiB": "--experts_on_device=8GiB is not a percentage such as 25%",
    "--traces=gptoss --experts_on_device=0.5%": "the minimum is one each, 0.781%",
    "--traces=gptoss --batches=99": "149 tokens in 1 sequences has 1 steps of batch=99, want 2",
    "--traces=my.npz": "--traces=my.npz: a path also wants --dense_bytes and --bits_per_weight",
    "--traces=my.npz --dense_bytes=9 --bits_per_weight=4": "my.npz: No such file or directory",
    "--traces=deepseek_v2_lite": "not shipped; name its folder in MOEJAX_TRACES",
    "--recall=1.5": "--recall=1.5: 1.5 is not",
}


@pytest.fixture(scope="module")
def refused():
    return refusals("experiments.simulate_offload", list(REFUSED))


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_input_ends_in_one_line(refused, line):
    result = refused[line]
    assert result["status"] == 2 and result["stderr"].count("\n") == 1, result["stderr"]
    assert REFUSED[line] in result["stderr"]


def test_reports_every_case(tmp_path):
    args = ("--traces=gptoss", "--hardware=A100-PCIe4", "--batches=16", "--max_steps=6")
    printed = run_child("experiments.simulate_offload", "", *args, f"--json={tmp_path}/out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    figures = report["figures"]
    assert report["rung"] == "simulated"
    (label, case), *others = figures["cases"].items()
    assert label == "gptoss B=16 A100-PCIe4" and not others
    assert case["trace_is_cut"] and (case["steps_to_choose"], case["steps_scored"]) == (2, 3)
    assert set(case["fixed_ms"]) == set(figures["gain_over"]) == set(FIXED)
    best = min(case["fixed_ms"].values())
    assert case["best_fixed"] in FIXED and case["fixed_ms"][case["best_fixed"]] == best
    assert case["regret"] == pytest.approx(case["chosen_ms"] / best - 1, abs=1e-3)
    assert figures["regret_vs_best_fixed"] == case["regret"] < 0.02
    assert case["chosen_ms"] >= case["fractional_bound_ms"] > 0
    gain = case["fixed_ms"]["lru"] / case["chosen_ms"] - 1
    assert figures["gain_over"]["lru"] == pytest.approx(gain, abs=1e-3)
    ablation = figures["ablation_ms"][label]
    assert ablation["+ host compute"] < 0.5 * ablation["on_demand"]
    assert all("simulated" in line for line in printed.splitlines() if " ms per " in line)
    assert "simulated from one text cut into pieces: gptoss B=16" in printed
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
