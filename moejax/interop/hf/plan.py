"""The rules of an architecture, spelled out for one model: every tensor, every parameter.

Axis letters:
    L  layers, Lm of them MoE    E  experts
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import jax

from moejax.core.errors import check
from moejax.interop.hf.rules import Either, Layout, Rule, Rules, Shape
from moejax.kernels.quantized import whole_matrix
from moejax.models.config import Cycle, DecoderConfig
from moejax.models.params import DecoderParams, LayerParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A parameter of one layer (or expert): `index` into the leading axes of a leaf."""

    leaf: str  # such as groups.0.attention.w_q, or experts.w_gate
    index: tuple[int, ...]
    shape: Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor, or one row of it, and the parameters that it holds."""

    name: str
    row: int | None
    how: Layout
    targets: tuple[Target, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a layer's parameters are: the entry of its group, and indices into its leaves."""

    prefix: str
    index: tuple[int, ...]
    moe_layer: int | None


def leaves_of(tree: Any) -> dict[str, Any]:
    """The leaves of (DecoderParams without experts, experts) by name; quantised matrices whole."""
    dense, experts = tree
    named = jax.tree_util.tree_leaves_with_path(dense)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in named}
    for path, leaf in jax.tree_util.tree_leaves_with_path(experts, is_leaf=whole_matrix):
        leaves["experts." + jax.tree_util.keystr(path, simple=True, separator=".")] = leaf
    return leaves


def make_plan(
    rules: Rules, cfg: DecoderConfig, leaves: dict[str, Any], names: Iterable[str] | None = None
) -> list[Piece]:
    """The pieces that fill `leaves` (anything with a shape), each parameter exactly once.

    `names` are the tensors of a checkpoint, by which an `Either` is decided; None takes the first.
    """
    present = None if names is None else set(names)
    pieces = [
        piece
        for rule in rules
        for piece in (
            _decide(rule, cfg, leaves, present)
            if isinstance(rule, Either)
            else _expand(rule, cfg, leaves)
        )
    ]
    _check_covered(pieces, leaves)
    return pieces


def check_tensors(
    pieces: list[Piece], shapes: dict[str, Shape], ignored: tuple[str, ...], where: str
) -> list[str]:
    """Names of tensors that nothing uses, all of which match a pattern of `ignored`.

    Raises `InputError` naming the first few of missing or unexpected tensors.
    """
    wanted = {piece.name for piece in pieces}
    missing = sorted(wanted - shapes.keys())
    check(
        not missing, f"{where} lacks {len(missing)} tensors of the model: {', '.join(missing[:3])}"
    )
    unused = sorted(shapes.keys() - wanted)
    extra = [name for name in unused if not any(re.match(p, name) for p in ignored)]
    check(not extra, f"{where} has {len(extra)} tensors too many: {', '.join(extra[:3])}")
    return unused


def check_size(piece: Piece, shape: Shape, where: str) -> None:
    """Raises `InputError` unless a tensor of `shape` has as many numbers as its parameters."""
    have = math.prod(shape[1:] if piece.row is not None else shape)
    want = sum(math.prod(target.shape) for target in piece.targets)
    spelled = ", ".join(f"{target.leaf}{list(target.shape)}" for target in piece.targets)
    check(
        have == want,
        f"{where}: {piece.name} has shape {list(shape)}, which does not hold {spelled}",
    )


def places(cfg: DecoderConfig) -> list[Place]:
    """Of every layer."""
    places, moe_layers = [], 0
    for g, group in enumerate(cfg.groups):
        repeats = range(group.repeats) if isinstance(group, Cycle) else [None]
        for repeat in repeats:
            parts = enumerate(group.groups) if isinstance(group, Cycle) else [(None, group)]
            for p, part in parts:
                for i in range(part.num_layers):
                    prefix = f"groups.{g}" if p is None else f"groups.{g}.{p}"
                    index = (i,) if repeat is None else (repeat, i)
                    moe_layer = moe_layers if part.moe else None
                    places.append(Place(prefix=prefix, index=index, moe_layer=moe_layer))
                    moe_layers += part.moe is not None
    return places


def group_entry(params: DecoderParams, place: Place) -> LayerParams:
    """The stacked layers of the group that `place` is in."""
    entry: Any = params.groups
    for step in place.prefix.split(".")[1:]:
        entry = entry[int(step)]
    return entry


def _decide(either: Either, cfg, leaves, present) -> list[Piece]:
    """The pieces of the first option of which the checkpoint has any tensor, else of the first."""
    options = [
        [p for rule in option for p in _expand(rule, cfg, leaves)] for option in either.options
    ]
    for pieces in options:
        if present and any(piece.name in present for piece in pieces):
            return pieces
    return options[0]


def _expand(rule: Rule, cfg: DecoderConfig, leaves: dict[str, Any]) -> list[Piece]:
    if "{" not in rule.name:
        return [p for p in [_piece(rule, rule.name, None, "", (), leaves)] if p]
    pieces = []
    for layer, place in enumerate(places(cfg)):
        if not rule.to.startswith("experts."):
            name = _spell(rule.name, layer)
            pieces.append(_piece(rule, name, None, place.prefix + ".", place.index, leaves))
        elif place.moe_layer is not None:
            for e in range(leaves["experts.w_gate"].shape[1]):
                name, row = _spell(rule.name, layer, e), e if rule.stacked else None
                pieces.append(_piece(rule, name, row, "", (place.moe_layer, e), leaves))
    return [piece for piece in pieces if piece]


def _spell(name: str, layer: int, expert: int = 0) -> str:
    return name.format(l=layer, half=layer // 2, side=layer % 2, e=expert)


def _piece(rule, name, row, prefix, index, leaves) -> Piece | None:
    """None where the model has none of the rule's parameters."""
    names = [prefix + path for path in rule.to.split()]
    if not any(leaf in leaves for leaf in names):
        return None
    targets = tuple(
        Target(leaf=leaf, index=index, shape=leaves[leaf].shape[len(index) :]) for leaf in names
    )
    return Piece(name=name, row=row, how=rule.how, targets=targets)


def _check_covered(pieces: list[Piece], leaves: dict[str, Any]) -> None:
    """Every element of every leaf is filled, and by one piece."""
    filled: dict[str, list[tuple[int, ...]]] = {}
    for piece in pieces:
        for target in piece.targets:
            filled.setdefault(target.leaf, []).append(target.index)
    wrong = []
    for name, leaf in leaves.items():
        indices = filled.get(name, [])
        depth = len(indices[0]) if indices else 0
        if len(set(indices)) != len(indices) or len(indices) != math.prod(leaf.shape[:depth]):
            wrong.append(f"{name} ({len(indices)} of {math.prod(leaf.shape[:depth])})")
        elif not indices:
            wrong.append(name)
    check(not wrong, f"the name map fills {len(wrong)} parameters not once: {', '.join(wrong[:3])}")
