"""The program on a recorded run, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest

from tests.experiments.test_replay_trace import ROOT

REFUSED = {
    "": "--trace is missing",
    "--trace=qwen --windows=4,0": "--windows=4,0: not positive whole numbers",
    "--trace=gptoss --rho=two": "--rho=two: 'two' is not a number",
    "--trace=gptoss --rho=0.1": "rho=0.1 of top_k=2 experts is no entry",
    "--trace=gptoss --windows=999": "window=999: all 1 sequences are shorter",
    "--trace=deepseek_v2_lite": "not shipped; name its folder in MOEJAX_TRACES",
    "--trace=nothing.npz": "--trace=nothing.npz: No such file or directory",
}


def run_child(module, stdin="", *args):
    env = {k: v for k, v in os.environ.items() if k != "MOEJAX_TRACES"}
    done = subprocess.run(
        [sys.executable, "-m", module, *args],
        input=stdin,
        cwd=ROOT,
        env=env | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusals(module, lines):
    """What `module` says to wrong command lines, all run in one process."""
    cases = json.dumps([{"args": line.split(), "fault": None} for line in lines])
    out = run_child("tests.experiments.wrong_input_child", cases, module)
    return dict(zip(lines, json.loads(out.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def refused():
    return refusals("experiments.routing_consistency", list(REFUSED))


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_input_ends_in_one_line(refused, line):
    result = refused[line]
    assert result["status"] == 2 and result["stderr"].count("\n") == 1, result["stderr"]
    assert REFUSED[line] in result["stderr"]


def test_measures_a_recorded_run(tmp_path):
    args = ("--trace=gptoss", "--rho=1,4", "--windows=4,16", f"--json={tmp_path}/out.json")
    printed = run_child("experiments.routing_consistency", "", *args)
    report = json.loads((tmp_path / "out.json").read_text())
    figures = report["figures"]
    assert report["rung"] == "simulated" and figures["sequences_excluded"] == {"4": 0, "16": 0}
    assert list(figures["srp"]) == ["4", "16"] and list(figures["sch"]["16"]) == ["1", "4"]
    for rho in ("1", "4"):
        online = (figures["lru"][rho], figures["lfu"][rho], figures["sch"]["4"][rho])
        assert 0.05 < max(online) <= figures["belady"][rho] < 1
    assert 0.2 < figures["srp"]["16"] < figures["srp"]["4"] < 1
    assert f"{figures['srp']['4']:.3f}" in printed
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
