"""Strategies by name: the published table, invalid pairs, options."""

import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.dispatch.api import GATES, STRATEGIES, check_pair, make_dispatch
from moejax.dispatch.slots import FITS_ALL, Capacity
from moejax.experts.stage import reference, resident
from moejax.layers.moe import MoEConfig, init_moe, moe
from moejax.routing.config import ExpertChoiceConfig, RouterConfig, SoftConfig
from tests.dispatch.cases import (
    D,
    E,
    T,
    check_exact,
    compiled,
    cube,
    layout,
    routings,
)
from tests.dispatch.gates import alone, over_mesh, random_like
from tests.kernels.cases import assert_close

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "dispatch.md"


def test_every_pair_is_allowed_or_raises():
    for name, strategy in STRATEGIES.items():
        for gate in GATES:
            if gate in strategy.gates:
                check_pair(name, gate)
            else:
                with pytest.raises(InputError, match=f"'{name}' does not go with gate '{gate}'"):
                    make_dispatch(name, num_experts=E, gate=gate)


def test_configs_name_their_gates_and_flag_those_that_look_ahead():
    configs = [
        RouterConfig(num_experts=E, top_k=2),
        RouterConfig(num_experts=E, top_k=2, num_groups=2, top_groups=1),
        RouterConfig(num_experts=E, top_k=2, num_groups=2, group_choice="balanced"),
        ExpertChoiceConfig(num_experts=E),
        SoftConfig(num_experts=E),
    ]
    assert [cfg.gate for cfg in configs] == list(GATES)
    assert [cfg.causal for cfg in configs] == ["not causal" not in GATES[c.gate] for c in configs]


def test_the_docs_hold_the_table():
    text = DOCS.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for name, strategy in STRATEGIES.items():
        marks = " | ".join("yes" if gate in strategy.gates else "-" for gate in GATES)
        drops = "counted" if strategy.drops else "none"
        want = f"| `{name}` | {strategy.moves} | {strategy.shape} | {drops} | {marks} |"
        assert want in rows, want


SIGMOID = {"score": "sigmoid", "correction_bias": True}
ROUTERS = {
    "top_k": RouterConfig(num_experts=E, top_k=2, **SIGMOID),
    "x_moe": RouterConfig(num_experts=E, top_k=2, projection_dim=3, correction_bias=True),
    "group_limited": RouterConfig(
        num_experts=E, top_k=2, num_groups=4, top_groups=2, group_score="top2_sum", **SIGMOID
    ),
    "balanced_groups": RouterConfig(
        num_experts=E, top_k=4, num_groups=4, group_choice="balanced", correction_bias=True
    ),
}
STRATEGY_OPTIONS: dict[str, dict[str, Any]] = {
    "gather": {},
    "all_to_all": {"capacity": FITS_ALL},
    "ragged": {"capacity": FITS_ALL},
    "hierarchical": {},
    "materialize": {"num_copies": E},
    "grouped": {"num_groups": 4},
}
# Every strategy and every gate at least once; the other pairs with --full.
BY_DEFAULT = {
    ("all_to_all", "x_moe"),
    ("ragged", "group_limited"),
    ("hierarchical", "top_k"),
    ("materialize", "balanced_groups"),
    ("grouped", "balanced_groups"),
    ("gather", "group_limited"),
}


def pairs():
    """All valid pairs of token-choice gates, the mesh and its kind of axes changing in turn."""
    meshes = [(1, 8, "auto"), (2, 4, "explicit"), (2, 4, "auto"), (1, 8, "explicit")]
    valid = [
        (name, gate)
        for name in STRATEGY_OPTIONS
        for gate, router in ROUTERS.items()
        if router.gate in STRATEGIES[name].gates
    ]
    for i, (name, gate) in enumerate(valid):
        marks = () if (name, gate) in BY_DEFAULT else pytest.mark.full
        # MoGE's groups are the ranks that its experts lie on.
        mesh = (2, 4, meshes[i % 4][2]) if name == "grouped" else meshes[i % 4]
        yield pytest.param(name, gate, mesh, marks=marks, id=f"{name}-{gate}")


@pytest.mark.parametrize(("name", "gate", "mesh"), list(pairs()))
def test_gates_equal_the_dense_reference(name, gate, mesh):
    """Values and gradients, gate weights included, with padding and idle experts."""
    where, router = layout(mesh[0], mesh[1], axis_type=mesh[2]), ROUTERS[gate]
    options = STRATEGY_OPTIONS[name] | {"gate": router.gate, "token_axes": where.token_axes}
    stage = make_dispatch(name, num_experts=E, inner=reference, **options)
    cfg = MoEConfig(d_ff=4, router=router)
    init = partial(init_moe, cfg=cfg, d_model=D, out_scale=1.0, dtype=jnp.float32)
    params, x = random_like(
        (jax.eval_shape(init, jax.random.key(0)), jax.ShapeDtypeStruct((T, D), jnp.float32))
    )
    idle = np.isin(np.arange(E), [1, 5, 15])  # never chosen
    bias = np.where(idle, np.float32(-9), np.float32(0))
    params = params.replace(router=params.router.replace(correction_bias=bias))
    mask = np.arange(T) % 5 != 2
    (got, (y, metrics)), grads = over_mesh(moe, cfg, stage, where, params)(params, x, mask)
    (want, (want_y, _)), want_grads = alone(moe, cfg, reference)(params, x, mask)
    assert_close((got, y, grads), (want, want_y, want_grads))
    np.testing.assert_array_equal(metrics.expert_load == 0, idle)
    assert metrics.assignments_dropped == 0
    for leaf in jax.tree.leaves(grads[0].router.replace(correction_bias=None)):
        assert np.abs(leaf).max() > 1e-3


def test_names_and_options():
    assert make_dispatch("local", num_experts=E) is resident
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"name": "ring"}, "dispatch 'ring' is not one of"),
        ({"name": "gather", "gate": "hash"}, "gate 'hash' is not one of"),
        ({"name": "gather", "capacity": 3}, "'gather' has no option 'capacity'"),
        ({"name": "grouped", "gate": "balanced_groups"}, "'grouped' wants num_groups"),
        ({"name": "materialize"}, "'materialize' wants num_copies"),
        ({"name": "gather", "fall_back": True}, "'gather' drops nothing"),
        ({"name": "gather", "num_chunks": 0}, "num_chunks=0 is not a positive integer"),
        ({"name": "gather", "num_chunks": 2.0}, "num_chunks=2.0 is not a positive integer"),
        ({"name": "all_to_all", "capacity": 1.25}, "capacity=1.25 is not a Capacity"),
        ({"name": "hierarchical", "levels": "expert"}, "levels='expert' is not a tuple of axes"),
        ({"name": "local", "token_axes": ("data",)}, "local serves tokens of one rank"),
        ({"name": "slots", "gate": "soft", "num_chunks": 2}, "gate 'soft' has no num_chunks=2"),
        ({"name": "slots", "gate": "soft", "fall_back": True}, "'slots' drops nothing"),
    ]
    for arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            make_dispatch(num_experts=E, **arguments)


def test_all_at_once():
    """Hierarchical in two chunks, with a capacity and a fallback, over three levels."""
    where = cube()
    stage = make_dispatch(
        "hierarchical",
        num_experts=E,
        levels=("node", ("board", "chip")),
        token_axes=where.token_axes,
        inner=reference,
        capacity=Capacity(factor=1.0),
        num_chunks=2,
        fall_back=True,
    )
    run = compiled(stage, where)
    waves = {name: int(check_exact(run, idx).waves) for name, idx in routings().items()}
    assert waves["one_hot_expert"] > 2
