"""Memory kinds: place, move and inspect trees.

`with_sharding_constraint` silently ignores memory kinds and `eval_shape` loses them, so placement
is always spelled as `device_put` with a full sharding or as explicit `out_shardings`.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core.compat import DEVICE

PyTree = Any


def host_sharding(mesh: Mesh, spec: P | None = None) -> NamedSharding:
    """Sharding in `pinned_host` memory of every device of `mesh`."""
    return NamedSharding(mesh, spec or P(), memory_kind="pinned_host")


def device_sharding(mesh: Mesh, spec: P | None = None) -> NamedSharding:
    """Sharding in device memory."""
    return NamedSharding(mesh, spec or P(), memory_kind="device")


def memory_kinds(tree: PyTree) -> set[str]:
    """The memory kinds that the arrays of `tree` live in."""
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves of a tree of arrays or `ShapeDtypeStruct`s."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def fetch_rows(store: PyTree, index: jax.Array) -> PyTree:
    """Row `index` of every leaf `[N, ...]` of a host tree, moved to the device.

    Must run inside jit. One 1-D `dynamic_slice` per leaf: gathers, `take` and `vmap` of a slice all
    become host compute or an error. `index` is an int32 scalar on the device. Cost: one host to
    device transfer of a row per leaf.
    """

    def fetch(leaf: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=True)
        return jax.device_put(row, DEVICE)[0]

    return jax.tree.map(fetch, store)
