"""The benchmark's arms compute what one device computes, and its rows are the incidences."""

from functools import partial

import jax
import numpy as np
import pytest

from experiments.bench.dispatch import (
    TOP_K,
    check_values,
    compile_arm,
    layer,
    make_inputs,
    row_counts,
    strategies,
)
from moejax.core.mesh import make_mesh
from moejax.experts.stage import resident


def test_an_arm_moves_bytes_and_keeps_the_values():
    mesh = make_mesh(data=2, expert=4)
    uniform, _ = make_inputs(64)
    run, moved = compile_arm(strategies()["gather"], mesh, uniform)
    want = jax.jit(partial(layer, resident))(*uniform)[0]
    assert check_values("gather", run, want) == 0
    assert moved["data"] > moved["expert"] > 0
    with pytest.raises(RuntimeError, match="gather differs from local"):
        check_values("gather", run, 2 * np.asarray(want))


def test_rows_sent_are_the_incidences():
    uniform, _ = make_inputs(64)
    counts = row_counts(make_mesh(data=2, expert=4), uniform[1])
    assert counts["valid_rows"] == counts["incidence_rows"]
    assert counts["valid_rows"]["hierarchical"][0] < counts["assignments"] == 64 * TOP_K
