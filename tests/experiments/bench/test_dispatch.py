"""The benchmark's arms compute what one device computes, and its rows are the incidences."""

from functools import partial

import jax
import numpy as np
import pytest

from experiments.bench.dispatch import (
    AXES,
    EXPERTS,
    TOP_K,
    check_values,
    compile_arm,
    crossings,
    make_inputs,
    one_hot,
    padding,
    row_counts,
    strategies,
)
from experiments.routed import serve_routed
from moejax.core.mesh import make_mesh
from moejax.dispatch.api import make_dispatch
from moejax.experts.stage import reference, resident


def test_an_arm_moves_bytes_and_keeps_the_values():
    mesh = make_mesh(data=2, expert=4)
    uniform, _ = make_inputs(64)
    want = jax.jit(partial(serve_routed, resident))(*uniform)[0]
    bare = make_dispatch(num_experts=EXPERTS, token_axes=AXES, **strategies()["gather"])
    run, moved, temporary = compile_arm(partial(serve_routed, bare), mesh, uniform)
    assert check_values("gather", run, want) == 0
    assert moved["data"] > moved["expert"] > 0 and temporary > 0
    with pytest.raises(RuntimeError, match="gather differs from local"):
        check_values("gather", run, 2 * np.asarray(want))


def test_one_hot_masks_drop_what_slots_drop():
    uniform, _ = make_inputs(64)
    mesh = make_mesh(data=2, expert=4)
    run, moved, _ = compile_arm(one_hot, mesh, uniform)
    slots = make_dispatch(
        num_experts=EXPERTS, token_axes=AXES, **strategies()["all_to_all"] | {"per": "expert"}
    )
    other, _, _ = compile_arm(partial(serve_routed, slots), mesh, uniform)
    (y, dropped), (want, lost) = run(), other()
    assert int(dropped) == int(lost) > 0 and moved["data"] > 0
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_crossings_equal_a_loop():
    uniform, _ = make_inputs(64)
    idx = np.asarray(uniform[1])
    want = {"data": 0, "expert": 0}
    for token, experts in enumerate(idx):
        node, chip = divmod(token // 8, 4)
        ranks = {int(e) // 8 for e in experts}
        want["data"] += len({r // 4 for r in ranks} - {node})
        want["expert"] += sum(r % 4 != chip for r in ranks)
    assert crossings(idx) == want
    moved = {axis: 2 * n * 1024 for axis, n in want.items()}
    assert padding(moved, idx) == {"data": 1.0, "expert": 1.0}


def test_rows_sent_are_the_incidences():
    uniform, _ = make_inputs(64)
    counts = row_counts(make_mesh(data=2, expert=4), uniform[1])
    assert counts["valid_rows"] == counts["incidence_rows"]
    assert counts["valid_rows"]["hierarchical"][0] < counts["assignments"] == 64 * TOP_K


def test_the_wire_carries_little_more_than_what_must_travel():
    """HierMoE's point at K=8, with a capacity: bytes of the compiled programs, padding included."""
    uniform, _ = make_inputs(2048)
    mesh, moved = make_mesh(data=2, expert=4), {}
    for name in ("hierarchical", "all_to_all"):
        stage = make_dispatch(
            num_experts=EXPERTS, token_axes=AXES, inner=reference, **strategies()[name]
        )
        _, moved[name], _ = compile_arm(partial(serve_routed, stage), mesh, uniform)
    ratios = padding(moved["hierarchical"], np.asarray(uniform[1]))
    assert all(1 <= ratio <= 1.25 for ratio in ratios.values()), ratios
    assert sum(moved["hierarchical"].values()) < sum(moved["all_to_all"].values())
    assert moved["hierarchical"]["data"] < 0.25 * moved["all_to_all"]["data"]
