"""The program on a small trace: figures, folds that are kept, what it refuses."""

import json

import numpy as np
import pytest

from experiments import predictors
from moejax.core.errors import InputError
from moejax.data.routing_trace import from_recorded, save_trace
from tests.experiments.test_routing_consistency import run_main

L, E, K = 4, 8, 2
SMALL = (
    "--folds=2 --horizons=1,2 --set horizon_steps=12 --set batch=32 --set hidden=8 "
    "--set embedding=8"
)
REFUSED = {
    "": "--trace is missing",
    "--trace=qwen": "folds=5 is not between 2 and sequences=1",
    "--trace=gptoss --horizons=2,4": "--horizons=2,4: not 1,2,... in order",
    "--trace=gptoss --set hidden=0": "hidden=0 must be at least 1",
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Layer 0 chooses at random, every later layer the images of the choices before it."""
    rng = np.random.default_rng(0)
    idx = [rng.permuted(np.tile(np.arange(E), (600, 1)), axis=-1)[:, :K]]
    for _ in range(L - 1):
        idx.append(rng.permutation(E)[idx[-1]])
    path = tmp_path_factory.mktemp("trace") / "chain.npz"
    lengths = [70, 130, 50, 150, 110, 90]
    save_trace(
        path, from_recorded(np.stack(idx), num_experts=E, expert_bytes=8, sequence_lengths=lengths)
    )
    return path


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_input_is_refused_in_one_line(line):
    with pytest.raises(InputError) as error:
        run_main(predictors, line)
    assert REFUSED[line] in str(error.value) and "\n" not in str(error.value)


def test_folds_are_judged_and_kept(trace, tmp_path, capsys):
    line = f"--trace={trace} {SMALL} --folds_dir={tmp_path}/kept --json={tmp_path}/out.json"
    run_main(predictors, line)
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    recall = figures["recall"]
    assert recall["bigram"]["1"]["2"] == 1.0  # the chain, two layers ahead too
    assert recall["bigram"]["2"]["2"] == 1.0
    assert recall["popularity"]["1"]["2"] < 0.5 and figures["exact_set"]["bigram"]["1"] == 1.0
    assert 0.2 < recall["history"]["1"]["2"] <= recall["history"]["1"]["4"] <= 1
    assert figures["wasted_bytes"]["bigram"]["1"]["4"] == 16.0
    assert "weight_mass" not in figures and len(figures["recall_by_layer"]["history"]["2"]) == L - 2
    assert figures["history"]["multiply_adds_per_layer"] == 2 * 8 * 8 + 8 * E + 2 * E
    assert f"{recall['history']['1']['2']:.3f}" in capsys.readouterr().out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")

    run_main(predictors, line.replace("out.json", "again.json"))
    again = json.loads((tmp_path / "again.json").read_text())["figures"]
    assert again["fit_secs"] == figures["fit_secs"] and again["recall"] == recall
    with pytest.raises(InputError, match="of another trace, split or --set"):
        run_main(predictors, f"{line} --set seed=1")
