"""Varying axes inside `shard_map`: loops and custom gradients want operands that agree."""

from typing import Any

import jax
from jax import lax


def vary_together(*trees: Any) -> tuple[Any, ...]:
    """Marks every array as varying over all mesh axes that any of them varies over.

    Outside `shard_map` it does nothing. The transpose of the mark is a `psum`, so a replicated
    operand of a per-rank kernel gets its summed gradient without the kernel knowing about ranks.
    """
    axes = frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(trees)))
    return vary_over(tuple(sorted(axes)), trees)


def vary_over(axes: tuple[str, ...], tree: Any) -> Any:
    """Marks every array as varying over `axes` too."""

    def mark(leaf: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in _axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def _axes(leaf: jax.Array) -> frozenset[str]:
    return jax.typeof(leaf).manual_axis_type.varying
