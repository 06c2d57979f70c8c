"""The program on a recorded run, and what it refuses."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import routing_consistency
from moejax.core.errors import InputError

REFUSED = {
    "": "--trace is missing",
    "--trace=qwen --windows=4,0": "--windows=4,0: not positive whole numbers",
    "--trace=gptoss --rho=two": "--rho=two: 'two' is not a number",
    "--trace=gptoss --rho=0.1": "rho=0.1 of top_k=2 experts is no entry",
    "--trace=gptoss --windows=999": "window=999: all 1 sequences are shorter",
    "--trace=deepseek_v2_lite": "not shipped; name its folder in MOEJAX_TRACES",
    "--trace=nothing.npz": "--trace=nothing.npz: No such file or directory",
}


def run_main(program, line):
    """Runs a program's `main` in this process, under the flags of `line`."""
    with flagsaver.flagsaver():
        flags.FLAGS(["program", *line.split()])
        program.main()


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_input_is_refused_in_one_line(line, monkeypatch):
    monkeypatch.delenv("MOEJAX_TRACES", raising=False)
    with pytest.raises(InputError) as error:
        run_main(routing_consistency, line)
    assert REFUSED[line] in str(error.value) and "\n" not in str(error.value)


def test_measures_a_recorded_run(tmp_path, capsys):
    line = f"--trace=gptoss --rho=1,4 --windows=4,16 --json={tmp_path}/out.json"
    run_main(routing_consistency, line)
    printed = capsys.readouterr().out
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
