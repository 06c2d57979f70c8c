"""Strategies by name: the published table, invalid pairs, options."""

import pathlib
from typing import Any

import pytest

from moejax.core.errors import InputError
from moejax.dispatch.api import GATES, STRATEGIES, check_pair, make_dispatch
from moejax.dispatch.slots import Capacity
from moejax.experts.stage import resident
from tests.dispatch.cases import E, check_exact, compiled, cube, routings

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "dispatch.md"


def test_every_pair_is_allowed_or_raises():
    for name, strategy in STRATEGIES.items():
        for gate in GATES:
            if gate in strategy.gates:
                check_pair(name, gate)
            else:
                with pytest.raises(InputError, match=f"'{name}' does not go with gate '{gate}'"):
                    make_dispatch(name, num_experts=E, gate=gate)


def test_the_docs_hold_the_table():
    text = DOCS.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for name, strategy in STRATEGIES.items():
        marks = " | ".join("yes" if gate in strategy.gates else "-" for gate in GATES)
        drops = "counted" if strategy.drops else "none"
        want = f"| `{name}` | {strategy.moves} | {strategy.shape} | {drops} | {marks} |"
        assert want in rows, want


def test_names_and_options():
    assert make_dispatch("local", num_experts=E) is resident
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"name": "ring"}, "dispatch 'ring' is not one of"),
        ({"name": "gather", "gate": "hash"}, "gate 'hash' is not one of"),
        ({"name": "gather", "capacity": 3}, "'gather' has no option 'capacity'"),
        ({"name": "grouped", "gate": "balanced_groups"}, "'grouped' wants num_groups"),
        ({"name": "materialize"}, "'materialize' wants num_copies"),
        ({"name": "gather", "fall_back": True}, "'gather' drops nothing"),
        ({"name": "gather", "num_chunks": 0}, "num_chunks=0 must be at least 1"),
        ({"name": "local", "token_axes": ("data",)}, "local serves tokens of one rank"),
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
        capacity=Capacity(factor=1.0),
        num_chunks=2,
        fall_back=True,
    )
    run = compiled(stage, where)
    waves = {name: int(check_exact(run, idx).waves) for name, idx in routings().items()}
    assert waves["one_hot_expert"] > 2
