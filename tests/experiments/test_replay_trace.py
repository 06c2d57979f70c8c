"""The program end to end: a recorded run, a trace of our own. Wrong input: `test_wrong_input`."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

from moejax.data.routing_trace import from_recorded, save_trace
from moejax.simulator.reference import replay_reference

ROOT = pathlib.Path(__file__).parents[2]
GPTOSS = ROOT / "tests" / "data" / "traces" / "gptoss.route.csv"


def run_program(*args):
    return subprocess.run(
        [sys.executable, "-m", "experiments.replay_trace", *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_replays_a_recorded_run(tmp_path):
    done = run_program(
        f"--trace={GPTOSS}",
        "--policies=lru,layer,belady",
        "--budget_mib=3000,500",
        f"--json={tmp_path}/out/replay.json",
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["replay.json", "replay.png"]
    report = json.loads((tmp_path / "out" / "replay.json").read_text())
    figures = report["figures"]
    assert report["rung"] == "simulated" and figures["model"] == "gpt-oss-120b-Q4_K_M"
    # LRU at 3000 MiB is what the recorded run did: 2066 hits of 4608 lookups.
    assert figures["hit_rate"]["lru"] == {"500": 0.0, "3000": 44.835}
    assert figures["hit_rate"]["belady"]["3000"] == 67.795
    assert figures["hit_rate_cumulative"]["lru"]["3000"] == 32.408
    assert figures["decode_mib_per_token"]["lru"]["3000"] == round(2542 / 64 * 13219200 / 2**20, 3)
    assert figures["peak_mib"]["lru"]["3000"] <= 3000
    assert figures["decode_calls_over_budget"]["layer"] == {"500": 36 * 64, "3000": 0}
    recorded = figures["recorded"]
    assert (recorded["hit_rate"], recorded["hit_rate_cumulative"]) == (44.835, 32.408)
    assert (recorded["rows_with_residency_0"], recorded["rows_with_bytes"]) == (8494, 4309)
    assert recorded["mib_loaded"] == figures["mib_loaded"]["lru"]["3000"]
    assert recorded["closest_replay"] == {
        "policy": "lru",
        "budget_mib": "3000",
        "calls_that_differ": 0,
    }
    assert "44.8" in done.stdout and "67.8" in done.stdout and "*" in done.stdout
    assert (tmp_path / "out" / "replay.png").read_bytes().startswith(b"\x89PNG")


def test_replays_our_own_npz(tmp_path):
    rng = np.random.default_rng(0)
    idx = np.argsort(rng.random((2, 20, 8)) + np.arange(8) / 4, axis=-1)[..., :2]
    trace = from_recorded(idx, num_experts=8, expert_bytes=2**18, prompt_lengths=[4])
    save_trace(tmp_path / "own.npz", trace)
    done = run_program(
        f"--trace={tmp_path}/own.npz", "--budget_mib=1.5,2", f"--json={tmp_path}/own.json"
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "own.json").read_text())["figures"]
    assert "recorded" not in figures and figures["decoded_tokens"] == 16
    assert len(figures["hit_rate"]) == 6
    for policy in figures["hit_rate"]:
        for key, rate in figures["hit_rate"][policy].items():
            misses = [m for m, _ in replay_reference(trace, policy, int(float(key) * 2**20))]
            assert rate == round(100 * (1 - sum(misses[2:]) / (16 * 2 * 2)), 3)
