"""The shipped claims about compiled programs, at small size, from real compilations."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from experiments.aot_programs import OffloadedDecode, StreamingLayers
from experiments.aot_report import collect
from moejax.aot.compile import compile_for
from moejax.aot.targets import target_mesh

# Few layers compile faster; the cache is large, since one that fits into the TPU's vector memory is
# moved there for the step (and back), which would count as whole copies.
SMALL = OffloadedDecode(
    d_model=1024,
    d_ff=512,
    num_layers=3,
    num_experts=64,
    top_k=2,
    vocab_size=256,
    capacity=64,
    prefetch_lanes=2,
    device_budget="25%",
    workspace_mib=8,
)
EXPERT_BYTES = 3 * 1024 * 512 * 2


def _figures(program, target):
    built = program.build(target_mesh(target, expert=program.expert_axis))
    return collect(built, compile_for(built.fn, built.abstract_args))


@pytest.mark.parametrize("target, batch", [("v5e:2x2", 1), ("v6e:2x2", 8)])
def test_offloaded_decode_hides_its_prefetch(target, batch):
    figures = _figures(dataclasses.replace(SMALL, batch=batch), target)
    assert figures["prefetch_transfers"] == figures["prefetch_overlapped"] == 2 * 3
    assert figures["prefetch_bytes"] == 2 * EXPERT_BYTES
    assert figures["step_prefetch_bytes"] == 3 * 2 * EXPERT_BYTES
    assert figures["step_demand_bytes_at_most"] == 3 * min(2 * batch, 64) * EXPERT_BYTES
    assert figures["demand_transfers"] == figures["demand_overlapped"] == 3
    assert figures["host_temp_bytes"] == 0
    assert figures["whole_cache_copies"] == figures["whole_host_copies"] == 0
    assert figures["host_callbacks"] == figures["host_computes"] == 0
    assert figures["host_bytes"] == 3 * 64 * EXPERT_BYTES
    assert figures["device_bytes"] <= figures["device_budget_bytes"]
    assert figures["holds"]


@pytest.mark.full
@pytest.mark.parametrize("format, bits", [("int8", 8), ("int4", 4), ("fp8", 8)])
def test_quantised_experts_travel_as_they_are(format, bits):
    """Three groups of rows per column of w_down in fp8: scales that fill no tile of 8 rows."""
    program = dataclasses.replace(SMALL, experts_dtype=format, d_ff=384)
    figures = _figures(program, "v5e:1x1")
    weights = 3 * 1024 * 384
    groups = {"int8": 1, "int4": 1024 // 64, "fp8": 1024 // 128}[format]
    groups_down = {"int8": 1, "int4": 384 // 64, "fp8": 384 // 128}[format]
    expert_bytes = weights * bits // 8 + 4 * (2 * 384 * groups + 1024 * groups_down)
    assert figures["prefetch_transfers"] == figures["prefetch_overlapped"] == 2 * 6
    assert figures["prefetch_bytes"] == 2 * expert_bytes
    assert figures["host_bytes"] == 3 * 64 * expert_bytes
    assert figures["host_temp_bytes"] == 0
    assert figures["holds"]


def test_expert_parallel_offloaded_decode_holds_too():
    program = dataclasses.replace(SMALL, expert_axis=4, device_budget="100%")
    figures = _figures(program, "v5e:2x2")
    assert figures["holds"]
    assert figures["host_bytes"] == 3 * 16 * EXPERT_BYTES  # of each layer 16 experts per device
    assert {tuple(one["axes"]) for one in figures["collectives"]} == {("expert",)}


def test_conditional_fetches_are_reported_as_not_hidden():
    figures = _figures(dataclasses.replace(SMALL, fetch_mode="missing"), "v5e:2x2")
    assert figures["prefetch_transfers"] == 6
    assert figures["prefetch_overlapped"] == 0
    assert not figures["holds"]


@pytest.mark.parametrize("target", ["v5e:1x1", "v6e:1x1"])
def test_streaming_layers_hide_their_fetch(target):
    figures = _figures(StreamingLayers(d_model=256, d_ff=512, num_layers=4), target)
    assert figures["prefetch_transfers"] == figures["prefetch_overlapped"] == 3
    assert figures["host_bytes"] == 4 * 3 * 256 * 512 * 2
    assert figures["holds"]


def test_report_is_written_as_json(tmp_path):
    out = tmp_path / "report.json"
    flags = "--program=streaming_layers --target=v6e:1x1 --set=d_ff=512 --set=num_layers=2"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.aot_report", *flags.split(), f"--json={out}"],
        capture_output=True,
        text=True,
        env={**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["rung"] == "schedule"
    assert report["device"] == "TPU v6 lite (compiled for, not run)"
    assert report["figures"]["prefetch_overlapped"] == 3
    assert not [name for name in report["figures"] if "second" in name or "time" in name]
    assert "prefetch_overlapped" in done.stdout


def test_the_host_computes_misses_beside_device_and_link():
    """One host call per layer, asynchronous, behind it the last wave and every prefetch."""
    program = dataclasses.replace(SMALL, serve="host")
    built = program.build(target_mesh("v5e:2x2", expert=1))
    facts = compile_for(built.fn, built.abstract_args)
    figures = collect(built, facts)
    assert figures["host_computes"] == figures["host_computes_overlapped"] == 1
    (host,) = facts.host_computes
    fetches = facts.fetches(built.prefetch_scope)
    assert len(fetches) == 6 and all(one.start < host.start for one in fetches)
    assert all(one.done > host.done for one in fetches)
    assert figures["demand_transfers"] == 0 and figures["holds"]
