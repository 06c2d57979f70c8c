"""Counts on a trace with two kinds of sequences, and what is refused."""

import json

import numpy as np
import pytest

from experiments import regroup_tokens
from moejax.core.errors import InputError
from moejax.data.routing_trace import from_recorded, save_trace
from tests.experiments.test_routing_consistency import run_main

REFUSED = {
    "--trace=gptoss --batch_pairs=0": "--batch_pairs=0: not positive whole numbers",
    "--trace=gptoss --trials=0": "--trials=0 is not at least 1",
    "--trace=gptoss --length=999": "--length=999: the longest sequence has",
    "--trace=gptoss --length=16 --batch_pairs=4": "--batch_pairs=4: 1 sequences have 16 tokens",
}


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_input_is_refused_in_one_line(line):
    with pytest.raises(InputError) as error:
        run_main(regroup_tokens, line)
    assert REFUSED[line] in str(error.value) and "\n" not in str(error.value)


def test_two_kinds_of_sequences_are_told_apart(tmp_path):
    """Odd sequences choose two of experts 4 .. 7, even ones of 0 .. 3: a group needs four."""
    rng = np.random.default_rng(0)
    sets = rng.permuted(np.tile(np.arange(4), (3, 16, 8, 1)), axis=-1)[..., :2]
    sets[:, 1::2] += 4
    idx = sets.reshape(3, 16 * 8, 2)
    trace = from_recorded(idx, num_experts=8, expert_bytes=1, sequence_lengths=[8] * 16)
    save_trace(tmp_path / "kinds.npz", trace)
    line = f"--trace={tmp_path}/kinds.npz --batch_pairs=8 --length=8 --trials=2"
    run_main(regroup_tokens, f"{line} --json={tmp_path}/out.json")
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    row = figures["distinct_experts"]["8"]
    assert row["true"] <= 4 and row["past"] <= 4 and row["once"] <= 4
    assert row["before"] > 6
