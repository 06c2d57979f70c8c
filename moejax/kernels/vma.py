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

    def mark(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, trees)


def _axes(leaf: jax.Array) -> frozenset[str]:
    return jax.typeof(leaf).manual_axis_type.varying
