"""Fragments of a tree of weights: leaves, or rows of stacked ones, that are synchronised together.

Letters:
    L  layers of a stacked group
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core.errors import check


@dataclasses.dataclass(frozen=True)
class Part:
    """A leaf of a tree, by its number among the leaves, or rows of it."""

    leaf: int
    rows: tuple[int, ...] | None = None


Fragment = tuple[Part, ...]


def whole(tree: Any) -> tuple[Fragment]:
    """One fragment of everything."""
    return (tuple(Part(i) for i in range(len(jax.tree.leaves(tree)))),)


def by_layer(tree: Any, stacked: str = "groups") -> tuple[Fragment, ...]:
    """A fragment per layer in the order of the backward pass, and of all else with the first layer.

    Leaves with `stacked` in their path are [L, ...]; groups follow each other. What comes after the
    layers (output matrix, final norm) and before them (embedding) is not told apart, and goes with
    layer 0, whose backward pass ends last.
    """
    layers: dict[tuple, list[Part]] = {}
    rest = []
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
        if stacked not in names:
            rest.append(Part(i))
            continue
        after = path[names.index(stacked) + 1 :]
        group = getattr(after[0], "idx", 0) if after else 0
        for row in range(leaf.shape[0]):
            layers.setdefault((group, row), []).append(Part(i, (row,)))
    check(len(layers) > 0, f"no leaf has {stacked!r} in its path")
    ordered = [tuple(layers[key]) for key in sorted(layers, reverse=True)]
    return (*ordered[:-1], (*ordered[-1], *rest))


def strided(fragments: Sequence[Fragment], count: int) -> tuple[Fragment, ...]:
    """`count` fragments of every `count`-th: Streaming DiLoCo's."""
    check(
        1 <= count <= len(fragments),
        f"count={count} must be between 1 and {len(fragments)} fragments",
    )
    return tuple(
        tuple(part for fragment in fragments[first::count] for part in fragment)
        for first in range(count)
    )


def check_fragments(tree: Any, fragments: Sequence[Fragment]) -> None:
    """Raises `InputError` unless every row of every leaf is in exactly one fragment."""
    leaves = jax.tree.leaves(tree)
    seen: dict[tuple[int, int | None], int] = {}
    for number, fragment in enumerate(fragments):
        for part in fragment:
            check(0 <= part.leaf < len(leaves), f"fragment {number}: no leaf {part.leaf}")
            for row in part.rows if part.rows is not None else (None,):
                before = seen.setdefault((part.leaf, row), number)
                check(before == number, f"leaf {part.leaf} is in fragments {before} and {number}")
    for i, leaf in enumerate(leaves):
        rows = {row for j, row in seen if j == i}
        everything = rows == {None} or rows == set(range(leaf.shape[0] if leaf.ndim else 0))
        check(everything, f"of leaf {i}, of shape {leaf.shape}, only rows {sorted(map(str, rows))}")


def by_axes(leaves: Sequence[jax.Array], fragment: Fragment) -> tuple[Fragment, ...]:
    """The fragment in parts whose leaves vary over the same mesh axes, inside `shard_map`.

    Experts and dense weights cannot be one vector: ranks that share the latter would no longer know
    that they do.
    """
    groups: dict[frozenset, list[Part]] = {}
    for part in fragment:
        axes = jax.typeof(leaves[part.leaf]).manual_axis_type.varying
        groups.setdefault(axes, []).append(part)
    return tuple(tuple(parts) for parts in groups.values())


def take(leaves: Sequence[jax.Array], fragment: Fragment) -> jax.Array:
    """The fragment as one float32 vector."""
    parts = [_select(leaves[part.leaf], part).astype(jnp.float32) for part in fragment]
    return jnp.concatenate([part.reshape(-1) for part in parts])


def put(leaves: Sequence[jax.Array], fragment: Fragment, vector: jax.Array) -> list[jax.Array]:
    """The leaves with the fragment replaced, in their own dtypes."""
    result, at = list(leaves), 0
    for part in fragment:
        leaf = result[part.leaf]
        old = _select(leaf, part)
        new = vector[at : at + old.size].reshape(old.shape).astype(leaf.dtype)
        at += old.size
        # Static rows: a scatter with constant indices.
        result[part.leaf] = new if part.rows is None else leaf.at[list(part.rows),].set(new)
    assert at == vector.size
    return result


def size(tree: Any, fragment: Fragment) -> int:
    """Elements of a fragment."""
    leaves = jax.tree.leaves(tree)
    return sum(
        leaves[part.leaf].size
        if part.rows is None
        else len(part.rows) * (leaves[part.leaf].size // leaves[part.leaf].shape[0])
        for part in fragment
    )


def _select(leaf: jax.Array, part: Part) -> jax.Array:
    if part.rows is None:
        return leaf
    first, last = part.rows[0], part.rows[-1]
    if part.rows == tuple(range(first, last + 1)):
        return jax.lax.slice_in_dim(leaf, first, last + 1)
    return leaf[list(part.rows),]
