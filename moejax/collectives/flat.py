"""Schedules on arrays of any shape: cut into a schedule's chunks, and put together again.

Letters:
    C  chunks that a rank starts with
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from moejax.collectives.lower import run_schedule
from moejax.collectives.schedule import Schedule
from moejax.core.errors import check


def all_reduce(schedule: Schedule, tree: Any) -> Any:
    """Sums over ranks of every leaf, by an all-reduce schedule; inside `shard_map`.

    A leaf is one message per step, and is filled up with zeros to a multiple of C elements; use
    `ravel` first for trees of many small leaves. Rows of blocks for a codec are those of chunks:
    `project(codec, leaf, C)` says what becomes of a leaf of such a size.
    """
    chunks = len(schedule.start[0])
    check(schedule.start == schedule.end, "an all-reduce returns the chunks that it starts with")

    def reduce(leaf: jax.Array) -> jax.Array:
        rows = jnp.pad(leaf.reshape(-1), (0, -leaf.size % chunks)).reshape(chunks, -1)
        return run_schedule(schedule, rows)[0].reshape(-1)[: leaf.size].reshape(leaf.shape)

    return jax.tree.map(reduce, tree)


def ravel(tree: Any) -> tuple[Any, Any]:
    """(one vector per dtype, what `unravel` needs): fewer and longer messages."""
    leaves, treedef = jax.tree.flatten(tree)
    order = {str(leaf.dtype): None for leaf in leaves}
    vectors = {
        name: jnp.concatenate([leaf.reshape(-1) for leaf in leaves if str(leaf.dtype) == name])
        for name in order
    }
    return vectors, (treedef, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves))


def unravel(vectors: Any, spec: Any) -> Any:
    """The tree again."""
    treedef, shapes = spec
    rest, leaves = dict(vectors), []
    for shape, name in shapes:
        size = math.prod(shape)
        leaves.append(rest[name][:size].reshape(shape))
        rest[name] = rest[name][size:]
    return treedef.unflatten(leaves)
