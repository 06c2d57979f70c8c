"""Dispatch strategies by name, and which gate goes with which.

`STRATEGIES` is the published table of `docs/dispatch.md`. A pair that it does not allow raises:
nothing falls back to another strategy.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from moejax.core.errors import check
from moejax.dispatch.all_to_all import all_to_all
from moejax.dispatch.dropless import dropless
from moejax.dispatch.expert_slots import expert_slots
from moejax.dispatch.gather import gather
from moejax.dispatch.grouped import grouped
from moejax.dispatch.hierarchical import hierarchical
from moejax.dispatch.hooks import Hooks, hook_dispatch, hook_inner
from moejax.dispatch.materialize import materialize
from moejax.dispatch.pipelined import pipelined
from moejax.dispatch.ragged import ragged
from moejax.dispatch.ranks import axis_names
from moejax.dispatch.slots import FITS_ALL, Capacity
from moejax.experts.stage import Stage, resident

TOKEN_CHOICE = ("top_k", "group_limited", "balanced_groups")
SLOT_CHOICE = ("expert_choice", "soft")
GATES = {
    "top_k": "K experts per token: softmax, sigmoid, X-MoE, with or without a bias",
    "group_limited": "K experts inside the best groups of each token (DeepSeek)",
    "balanced_groups": "K / G experts inside each of G groups (MoGE)",
    "expert_choice": "every expert takes tokens; not causal",
    "soft": "every slot is a mixture of all tokens; not causal",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """A row of the table."""

    build: Callable[..., Stage]
    gates: tuple[str, ...] = TOKEN_CHOICE
    moves: str  # what travels
    shape: str  # how large the buffers are
    drops: bool  # whether it can drop assignments


def _local(*, num_experts: int, token_axes: tuple[str, ...] = (), inner: Stage = resident) -> Stage:
    check(not token_axes, f"local serves tokens of one rank, got token_axes={token_axes}")
    del num_experts
    return inner


STRATEGIES = {
    "local": Strategy(build=_local, moves="nothing", shape="exact", drops=False),
    "gather": Strategy(
        build=gather, moves="all tokens to all ranks", shape="R * T rows", drops=False
    ),
    "all_to_all": Strategy(
        build=all_to_all,
        moves="a row per assignment",
        shape="E * C rows, a capacity",
        drops=True,
    ),
    "ragged": Strategy(
        build=ragged,
        moves="a row per assignment, no padding on the wire",
        shape="a landing buffer",
        drops=True,
    ),
    "hierarchical": Strategy(
        build=hierarchical,
        moves="a row per token and group, at every level",
        shape="G * C rows per level, capacities",
        drops=True,
    ),
    "grouped": Strategy(
        build=grouped,
        gates=("balanced_groups",),
        moves="all tokens to all ranks",
        shape="R * T rows of K / R choices",
        drops=False,
    ),
    "materialize": Strategy(
        build=materialize,
        moves="the hottest experts to all ranks",
        shape="t experts",
        drops=True,
    ),
    "slots": Strategy(
        build=expert_slots,
        gates=SLOT_CHOICE,
        moves="a row per slot",
        shape="E * C rows, no slack",
        drops=False,
    ),
}


def check_pair(strategy: str, gate: str) -> None:
    """Raises `InputError` for unknown names and for pairs that the table does not allow."""
    check(strategy in STRATEGIES, f"dispatch {strategy!r} is not one of {sorted(STRATEGIES)}")
    check(gate in GATES, f"gate {gate!r} is not one of {sorted(GATES)}")
    allowed = STRATEGIES[strategy].gates
    check(
        gate in allowed,
        f"dispatch {strategy!r} does not go with gate {gate!r}, it wants one of {allowed}",
    )


def make_dispatch(
    name: str,
    *,
    num_experts: int,
    gate: str = "top_k",
    num_chunks: int = 1,
    fall_back: bool = False,
    hooks: Hooks | None = None,
    **options: Any,
) -> Stage:
    """The stage of a strategy, for use inside `shard_map`.

    >>> stage = make_dispatch("all_to_all", num_experts=64, fall_back=True, num_chunks=2)

    Args:
        name: a key of `STRATEGIES`.
        gate: a key of `GATES`, as the `gate` of a router's config says; what chooses the experts.
        num_chunks: `pipelined` in so many chunks of tokens.
        fall_back: `dropless` with `gather` over the same axes where the strategy drops anything.
        hooks: the four of them that concern a stage (`moejax.dispatch.hooks`), around every chunk.
        options: those of the strategy: `axis` (`levels` for `hierarchical`), `token_axes`,
            `capacity`, `inner`, ...

    Raises `InputError` for an invalid pair, and for options that the strategy does not have.
    """
    check_pair(name, gate)
    strategy = STRATEGIES[name]
    _check_options(name, options)
    _check_values(options, num_experts=num_experts, num_chunks=num_chunks)
    check(num_chunks == 1 or gate in TOKEN_CHOICE, f"gate {gate!r} has no num_chunks={num_chunks}")
    if hooks is not None:
        options["inner"] = hook_inner(options.get("inner", resident), hooks)
    stage = strategy.build(num_experts=num_experts, **options)
    if fall_back:
        check(strategy.drops, f"dispatch {name!r} drops nothing, it needs no fall_back")
        stage = dropless(stage, _gather_like(num_experts, options))
    if hooks is not None:
        stage = hook_dispatch(stage, hooks)
    return pipelined(stage, num_chunks=num_chunks) if num_chunks != 1 else stage


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Raises `InputError` for options that a strategy does not have, and for missing ones."""
    names = inspect.signature(STRATEGIES[name].build).parameters
    for option in options:
        check(option in names, f"dispatch {name!r} has no option {option!r}, only {list(names)}")
    for option, parameter in names.items():
        optional = parameter.default is not parameter.empty
        given = optional or option == "num_experts" or option in options
        check(given, f"dispatch {name!r} wants {option}")


def _check_values(options: dict[str, Any], **numbers: Any) -> None:
    """Raises `InputError` for values of another kind than the options have."""
    for option, value in numbers.items():
        check(
            isinstance(value, int) and value >= 1, f"{option}={value!r} is not a positive integer"
        )
    levels = options.get("levels", ())
    check(isinstance(levels, tuple), f"levels={levels!r} is not a tuple of axes")
    rooms = options.get("capacity", FITS_ALL)
    for room in rooms if isinstance(rooms, tuple) else (rooms,):
        check(isinstance(room, Capacity), f"capacity={room!r} is not a Capacity")


def _gather_like(num_experts: int, options: dict[str, Any]) -> Stage:
    """`gather` over the axes that another strategy has as options."""
    shared = {key: options[key] for key in ("axis", "token_axes", "inner") if key in options}
    if "levels" in options:
        shared["axis"] = sum((axis_names(level) for level in options["levels"]), ())
    return gather(num_experts=num_experts, **shared)
