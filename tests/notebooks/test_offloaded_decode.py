"""The notebook runs as it is committed, at a small size, and its step compiles for a TPU."""

import glob
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import nbclient
import nbformat
import pytest
from jax.sharding import PartitionSpec as P

from moejax.aot.compile import abstract, compile_for
from moejax.aot.targets import target_mesh
from moejax.core.memory import device_sharding, host_sharding
from moejax.offload.store import EXPERT_SPEC
from moejax.serving.programs import AXIS

ROOT = pathlib.Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "notebooks" / "offloaded_decode.ipynb"
SMALL = """
num_layers, num_experts, top_k = 3, 32, 2
d_model = d_ff = 128
prompt_text, new_tokens = "Go", 24
device_budget, prefetch_lanes = "25%", 2
"""
SMALL_EXPERT_BYTES = 3 * 128 * 128 * 4
RESULTS = """
import json

print(json.dumps({
    "rung": rung,
    "identical": bool(identical),
    "tokens": {name: ours.tolist() for name, ours in tokens.items()},
    "kinds": [sorted(memory_kinds(tree)) for tree in (dense, host_experts)],
    "counts": {
        name: {field: int(getattr(ours, field).sum()) for field in (
            "lookups", "hits", "demand_fetches", "prefetches", "prefetches_wasted"
        )} for name, ours in metrics.items()
    },
    "hit_rate": hit_rate,
    "bytes_per_token": bytes_per_token,
    "limits": {" ".join(key): report.to_dict() for key, report in limits.items()},
}))
"""


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def cell(book, name):
    (found,) = [one for one in book.cells if one.id == name]
    return found


def stdout(one):
    return "".join(out.text for out in one.outputs if out.get("name") == "stdout")


@pytest.fixture(scope="module")
def ran():
    """The notebook, executed in a kernel of its own, and what its variables held at the end."""
    book = read()
    cell(book, "parameters").source += SMALL
    timed = 'rung = "time"\n' + cell(book, "table").source + "\n" + cell(book, "limits").source
    book.cells += [
        nbformat.v4.new_code_cell(RESULTS, id="results"),
        # The lines for accelerators, run where there is none.
        nbformat.v4.new_code_cell(timed, id="timed"),
        nbformat.v4.new_code_cell(RESULTS, id="results-timed"),
    ]
    folder = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources=folder).execute()
    return book, json.loads(stdout(cell(book, "results")))


def test_committed_without_outputs():
    code = [one for one in read().cells if one.cell_type == "code"]
    assert len(code) > 5
    assert all(one.outputs == [] and one.execution_count is None for one in code)


def test_every_engine_decodes_the_same_tokens(ran):
    _, results = ran
    assert results["identical"]
    ours = results["tokens"]
    assert list(ours) == ["resident", "offloaded", "offloaded + next gate"]
    assert all(tokens == ours["resident"] for tokens in ours.values())
    assert len(ours["resident"]) == 24 and len(set(ours["resident"])) > 4


def test_experts_stay_on_the_host_and_are_counted(ran):
    _, results = ran
    assert results["kinds"] == [["device"], ["pinned_host"]]
    counts = results["counts"]
    for name in ("offloaded", "offloaded + next gate"):
        count = counts[name]
        assert count["lookups"] == 24 * 3 * 2  # tokens, layers, experts
        assert count["lookups"] == count["hits"] + count["demand_fetches"]
        assert results["hit_rate"][name] == count["hits"] / count["lookups"]
        moved = count["demand_fetches"] + count["prefetches"]
        assert results["bytes_per_token"][name] == pytest.approx(moved * SMALL_EXPERT_BYTES / 24)
    assert results["bytes_per_token"]["resident"] == 0
    ahead, plain = counts["offloaded + next gate"], counts["offloaded"]
    assert plain["prefetches"] == 0
    assert ahead["prefetches_wasted"] < ahead["prefetches"]
    assert 0 < ahead["demand_fetches"] < plain["demand_fetches"]


def test_says_its_rung_and_shows_times_on_no_cpu(ran):
    book, results = ran
    assert results["rung"] == "numerics"
    assert "rung numerics" in stdout(cell(book, "rung"))
    shown = "".join(stdout(one) for one in book.cells[:-3] if one.cell_type == "code")
    assert "identical tokens: True" in shown
    assert "measured" not in shown and "ms/token" not in shown
    assert all(report["measured_s"] is None for report in results["limits"].values())


def test_limit_report_holds_the_counted_bytes(ran):
    _, results = ran
    assert len(results["limits"]) == 4  # two chips, two engines
    for name in ("offloaded", "offloaded + next gate"):
        report = results["limits"][f"v5e {name}"]
        assert report["bytes_per_step"] == results["bytes_per_token"][name]
        assert report["link_s"] == pytest.approx(report["bytes_per_step"] / 15.75e9)
        assert report["bound_s"] == max(report["link_s"], report["device_s"])


def test_the_lines_for_accelerators_run(ran):
    book, _ = ran
    assert "ms/token" in stdout(cell(book, "timed"))
    limits = json.loads(stdout(cell(book, "results-timed")))["limits"]
    measured = [report for name, report in limits.items() if name.startswith("measured ")]
    assert len(measured) == 2
    for report in measured:
        fraction = report["bound_s"] / report["measured_s"]
        assert report["achieved_fraction"] == pytest.approx(fraction)


def test_draws_one_figure(ran):
    book, _ = ran
    figures = [out for out in cell(book, "plot").outputs if "image/png" in out.get("data", {})]
    assert len(figures) == 1


def run_install(monkeypatch, *, importable, device_files=()):
    """What the install cell hands to pip, as lists of arguments."""
    calls = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if importable else None)
    monkeypatch.setattr(glob, "glob", lambda path: [path] if path in device_files else [])
    monkeypatch.setattr(subprocess, "check_call", calls.append)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    exec(cell(read(), "install").source, {})
    return calls


@pytest.mark.parametrize(
    "device_files, jax_package",
    [((), "jax"), (("/dev/nvidia[0-9]*",), "jax[cuda12]"), (("/dev/accel*",), "jax[tpu]")],
)
def test_installs_from_the_repository_when_missing(monkeypatch, device_files, jax_package):
    ((*pip, quiet, package, jax_wanted),) = run_install(
        monkeypatch, importable=False, device_files=device_files
    )
    assert pip == [sys.executable, "-m", "pip", "install"] and quiet == "--quiet"
    assert package == "moejax @ git+https://github.com/moejax/moejax"
    assert jax_wanted == jax_package


def test_installs_nothing_when_importable(monkeypatch):
    assert run_install(monkeypatch, importable=True) == []


@pytest.fixture
def definitions():
    """Names that the notebook defines before it holds an array, at its own size."""
    names = {}
    for one in read().cells:
        if {"parameters", "definitions"} & set(one.metadata.get("tags", [])):
            exec(one.source, names)
    return names


def test_its_step_streams_on_a_tpu(definitions):
    """Compiled for one v5e chip: nothing copied whole, every prefetch beside the last wave."""
    mesh, model = target_mesh("v5e:1x1"), definitions["model"]
    params = jax.eval_shape(lambda: definitions["init_decoder"](jax.random.key(0), model))
    dense, experts = definitions["split_experts"](params, model)
    dense = abstract(dense, device_sharding(mesh))
    experts = abstract(experts, host_sharding(mesh, EXPERT_SPEC))
    engine = definitions["engine_of"](dense, experts, mesh, lanes=definitions["prefetch_lanes"])

    session = jax.eval_shape(
        lambda predictor: engine.programs.start(predictor, batch=1, seed=0, temperature=1.0),
        engine.predictor,
    )
    offload = abstract(session.offload, device_sharding(mesh, P(AXIS)))
    session = abstract(session, device_sharding(mesh)).replace(offload=offload)
    arguments = (engine.params, engine.experts, engine.predictor, session)
    facts = compile_for(engine.programs.step, arguments)

    cache = session.offload.cache.rows
    assert cache.w_gate.shape == (1, 91, 512, 512)
    for shape in ((91, 512, 512), (6, 64, 512, 512), (6 * 64, 512, 512)):
        assert facts.whole_copies(shape) == ()
    assert facts.memory.host_temporaries == 0
    assert facts.host_callbacks == len(facts.host_computes) == 0
    assert facts.memory.host_bytes == 6 * 64 * 3 * 512 * 512 * 4
    prefetched = facts.fetches("offload_prefetch")
    assert len(prefetched) == 4 * 3  # lanes, parts of an expert
    assert facts.overlapped("offload_prefetch", "moe_last_wave") == prefetched
