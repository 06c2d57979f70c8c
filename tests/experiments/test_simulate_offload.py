"""The program on a recorded run, and what it refuses. Its figures are checked where they arise."""

import json

import pytest

from experiments import simulate_offload
from moejax.core.errors import InputError
from moejax.simulator.plans import FIXED
from tests.experiments.test_routing_consistency import run_main

REFUSED = {
    "--hardware=abacus": "hardware row 'abacus' is not one of RTX4090-PCIe3",
    "--batches=1,0": "--batches=1,0: not positive whole numbers",
    "--experts_on_device=8GiB": "--experts_on_device=8GiB is not a percentage such as 25%",
    "--traces=gptoss --experts_on_device=0.5%": "the minimum is one each, 0.781%",
    "--traces=gptoss --batches=99": "149 tokens in 1 sequences has 1 steps of batch=99, want 2",
    "--traces=my.npz": "--traces=my.npz: a path also wants --dense_bytes and --bits_per_weight",
    "--traces=my.npz --dense_bytes=9 --bits_per_weight=4": "my.npz: No such file or directory",
    "--traces=deepseek_v2_lite": "not shipped; name its folder in MOEJAX_TRACES",
}


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_input_is_refused_in_one_line(line, monkeypatch):
    monkeypatch.delenv("MOEJAX_TRACES", raising=False)
    with pytest.raises(InputError) as error:
        run_main(simulate_offload, line)
    assert REFUSED[line] in str(error.value) and "\n" not in str(error.value)


def test_reports_every_case(tmp_path, capsys):
    line = "--traces=gptoss --hardware=A100-PCIe4 --batches=64"
    run_main(simulate_offload, f"{line} --json={tmp_path}/out.json")
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    figures = report["figures"]
    assert report["rung"] == "simulated"
    (label, case), *others = figures["cases"].items()
    assert label == "gptoss B=64 A100-PCIe4" and not others
    assert case["trace_is_cut"] and (case["steps_to_choose"], case["steps_scored"]) == (1, 1)
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
    assert "simulated from one text cut into pieces: gptoss B=64" in printed
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
