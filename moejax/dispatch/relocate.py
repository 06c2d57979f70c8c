"""Experts of a whole state moved between placements: weights and optimizer state alike.

Whatever lies under a field `experts`, leaves [L, P, ...], goes with its expert; all else stays. A
checkpoint holds experts in logical order, [L, E, ...], so that any placement restores it.

Axis letters:
    L  MoE layers of a group    P  physical slots    E  experts    R  ranks on the `expert` axis
"""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core.errors import check
from moejax.core.structs import ExpertPlacement, at_layer
from moejax.dispatch.move import Swaps, move_rows, sources, swap_rows
from moejax.placement.build import identity, swapped

Tree = TypeVar("Tree")
Specs = tuple[tuple[P, ...], ...]
AXIS = "expert"


def relocate(tree: Tree, old: ExpertPlacement, new: ExpertPlacement, mesh: Mesh) -> Tree:
    """The state with experts where `new` wants them, to the bit; `tree` is donated.

    Args:
        tree: a training state, its parameters or its optimizer state. Leaves of experts are
            [L, P, ...] with slots sharded over `expert`; other dims may be sharded too.
        old, new: of equally many slots; of all layers, or with a leading [L] of each.

    Raises `InputError` for placements that do not fit. Compiled once for all placements. Cost: see
    `move_rows`; memory of one more layer.
    """
    check(
        old.num_slots == new.num_slots,
        f"the old placement has {old.num_slots} slots, the new one {new.num_slots}",
    )
    return _apply(tree, partial(_relocate, old=old, new=new, mesh=mesh), old, new, mesh)


def swap_experts(
    tree: Tree, placement: ExpertPlacement, mesh: Mesh, *, layers: Any, a: Any, b: Any
) -> tuple[Tree, ExpertPlacement]:
    """Slots `a[i]` and `b[i]` of MoE layer `layers[i]` exchanged, in the state and the placement.

    For HierMoE's swaps: a pair per layer, or few of all; a slot with itself is no swap. `tree` is
    donated. Raises `InputError` where all layers share a placement, for slots out of range and for
    one that occurs twice. Compiled once per number of swaps. Cost: one all-reduce of two experts
    per swap, all swaps together.
    """
    layers, a, b = (np.atleast_1d(np.asarray(one, np.int32)) for one in (layers, a, b))
    swaps = Swaps(layers=layers, a=a, b=b)
    _check_swaps(swaps, placement)
    moved = _apply(tree, partial(_swap, swaps=swaps, mesh=mesh), placement, placement, mesh)
    return moved, swapped(placement, layers, a, b)


def to_logical(tree: Tree, placement: ExpertPlacement, mesh: Mesh | None = None) -> Tree:
    """The state with every expert once and in order, leaves [L, E, ...]: what is saved.

    With a mesh the leaves come sharded over `expert`, which E must divide over; without one they
    are indexed where they are, numpy arrays on the host too.
    """
    logical = identity(placement.num_experts)
    if mesh is None:
        return _index(tree, placement, np.asarray(placement.log_to_phys)[..., 0])
    return _apply(
        tree, partial(_convert, old=placement, new=logical, mesh=mesh), placement, logical, mesh
    )


def to_physical(tree: Tree, placement: ExpertPlacement, mesh: Mesh | None = None) -> Tree:
    """The inverse of `to_logical`: a restored or new state [L, E, ...] in its slots [L, P, ...]."""
    logical = identity(placement.num_experts)
    if mesh is None:
        return _index(tree, logical, np.asarray(placement.phys_to_log))
    return _apply(
        tree, partial(_convert, old=logical, new=placement, mesh=mesh), logical, placement, mesh
    )


def per_layer(placement: ExpertPlacement, num_layers: int) -> ExpertPlacement:
    """The placement with a leading [L], the same in every layer."""
    return jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * num_layers), placement)


def expert_leaves(tree: Any) -> list[tuple[int, list[int]]]:
    """(first MoE layer, positions of the leaves under `experts`) of every group of layers."""
    groups: dict[int, list[int]] = {}
    depths: dict[int, int] = {}
    for position, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        names = [getattr(key, "name", None) for key in path]
        if "experts" in names:
            index = path[names.index("groups") + 1].idx if "groups" in names else 0
            groups.setdefault(index, []).append(position)
            depths[index] = leaf.shape[0]
    check(bool(groups), "the tree has no leaf under a field `experts`")
    return [
        (sum(depths[other] for other in depths if other < index), groups[index])
        for index in sorted(groups)
    ]


def _apply(tree: Any, fn: Any, old: ExpertPlacement, new: ExpertPlacement, mesh: Mesh) -> Any:
    """`fn(stacks, specs=...)` on the expert leaves of a tree, a tuple of leaves per group."""
    leaves, structure = jax.tree.flatten(tree)
    groups = [positions for _, positions in expert_leaves(tree)]
    stacks = tuple(tuple(leaves[i] for i in positions) for positions in groups)
    _check(stacks, old, new, mesh.shape[AXIS])
    moved = fn(stacks, specs=tuple(tuple(_spec(leaf) for leaf in stack) for stack in stacks))
    for positions, stack in zip(groups, moved, strict=True):
        for i, leaf in zip(positions, stack, strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def _spec(leaf: Any) -> P:
    """How a leaf [L, P, ...] is sharded; over `expert` alone where nobody said so yet."""
    sharding = getattr(leaf, "sharding", None)
    spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    while spec and spec[-1] is None:  # equal specs must compare equal, or jit compiles again
        spec = spec[:-1]
    return P(*spec) if spec[1:2] == (AXIS,) else P(None, AXIS)


def _check(stacks: tuple, old: ExpertPlacement, new: ExpertPlacement, ranks: int) -> None:
    check(
        old.num_experts == new.num_experts,
        f"the old placement has {old.num_experts} experts, the new one {new.num_experts}",
    )
    for placement in (old, new):
        slots, depth = placement.num_slots, placement.phys_to_log.shape[0]
        check(slots % ranks == 0, f"{slots} slots are not divisible by {ranks} ranks")
        layers = sum(stack[0].shape[0] for stack in stacks)
        check(
            placement.phys_to_log.ndim == 1 or depth == layers,
            f"the placement has {depth} layers, the tree {layers}",
        )
    for leaf in jax.tree.leaves(stacks):
        check(
            leaf.shape[1] == old.num_slots,
            f"a leaf under `experts` has {leaf.shape[1]} rows, the placement {old.num_slots}",
        )


def _check_swaps(swaps: Swaps, placement: ExpertPlacement) -> None:
    layers, a, b = swaps.layers, swaps.a, swaps.b
    check(
        placement.phys_to_log.ndim == 2,
        "a swap in one layer wants a placement with a leading [L], see `per_layer`",
    )
    check(
        layers.ndim == 1 and layers.shape == a.shape == b.shape and layers.size > 0,
        f"layers, a and b have shapes {layers.shape}, {a.shape} and {b.shape}",
    )
    depth, num_slots = placement.phys_to_log.shape
    for name, values, size in (("layer", layers, depth), ("slot", np.append(a, b), num_slots)):
        wrong = values[(values < 0) | (values >= size)]
        check(wrong.size == 0, f"{name} {wrong[:1].tolist()} is not one of {size}")
    places = np.append(layers * num_slots + a, (layers * num_slots + b)[a != b])
    ids, counts = np.unique(places, return_counts=True)
    twice = ids[counts > 1]
    check(
        twice.size == 0,
        f"slot {twice[:1] % num_slots} of layer {twice[:1] // num_slots} is swapped twice",
    )


def _firsts(stacks: tuple) -> list[int]:
    """First MoE layer of every group."""
    depths = [stack[0].shape[0] for stack in stacks]
    return [sum(depths[:i]) for i in range(len(depths))]


@partial(jax.jit, static_argnames=("specs", "mesh"), donate_argnames="stacks")
def _relocate(
    stacks: tuple, old: ExpertPlacement, new: ExpertPlacement, specs: Specs, mesh: Mesh
) -> tuple:
    def body(stacks: tuple, old: ExpertPlacement, new: ExpertPlacement) -> tuple:
        def move(layer: jax.Array, stack: tuple, first: int) -> tuple:
            source = _source(old, new, first + layer)
            rows = move_rows(jax.tree.map(lambda leaf: leaf[layer], stack), source, AXIS)
            return jax.tree.map(lambda leaf, row: leaf.at[layer].set(row), stack, rows)

        return tuple(
            jax.lax.fori_loop(0, stack[0].shape[0], partial(move, first=first), stack)
            for first, stack in zip(_firsts(stacks), stacks, strict=True)
        )

    run = jax.shard_map(body, mesh=mesh, in_specs=(specs, P(), P()), out_specs=specs)
    return run(stacks, old, new)


@partial(jax.jit, static_argnames=("specs", "mesh"))
def _convert(
    stacks: tuple, old: ExpertPlacement, new: ExpertPlacement, specs: Specs, mesh: Mesh
) -> tuple:
    def body(stacks: tuple, old: ExpertPlacement, new: ExpertPlacement) -> tuple:
        def move(step: tuple) -> tuple:
            layer, stack = step
            return move_rows(stack, _source(old, new, layer), AXIS)

        return tuple(
            jax.lax.map(move, (first + jnp.arange(stack[0].shape[0]), stack))
            for first, stack in zip(_firsts(stacks), stacks, strict=True)
        )

    run = jax.shard_map(body, mesh=mesh, in_specs=(specs, P(), P()), out_specs=specs)
    return run(stacks, old, new)


@partial(jax.jit, static_argnames=("specs", "mesh"), donate_argnames="stacks")
def _swap(stacks: tuple, swaps: Swaps, specs: Specs, mesh: Mesh) -> tuple:
    def body(stacks: tuple, swaps: Swaps) -> tuple:
        moved = swap_rows(list(zip(_firsts(stacks), stacks, strict=True)), swaps, AXIS)
        return tuple(stack for _, stack in moved)

    return jax.shard_map(body, mesh=mesh, in_specs=(specs, P()), out_specs=specs)(stacks, swaps)


def _source(old: ExpertPlacement, new: ExpertPlacement, layer: jax.Array) -> jax.Array:
    return sources(at_layer(old, layer), at_layer(new, layer), jax.lax.axis_size(AXIS))


def _index(tree: Any, held: ExpertPlacement, wanted: np.ndarray) -> Any:
    """Rows `wanted` ([Q] or [L, Q]) of every expert leaf, where it lies."""
    leaves, structure = jax.tree.flatten(tree)
    groups = expert_leaves(tree)
    _check(tuple(tuple(leaves[i] for i in g) for _, g in groups), held, held, 1)
    for first, positions in groups:
        layers = np.arange(leaves[positions[0]].shape[0])[:, None]
        rows = wanted[None] if wanted.ndim == 1 else wanted[first + layers[:, 0]]
        for i in positions:
            leaves[i] = leaves[i][layers, rows]
    return jax.tree.unflatten(structure, leaves)
