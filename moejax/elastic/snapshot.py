"""Snapshots in host memory that survive the loss of any one host.

Each host keeps its own bytes, and of every stripe the exclusive or of what the others cut for it
(`collectives.parity`; REFT, arXiv 2310.12670): 1 / (R - 1) more memory. When one host is lost, the
others' pieces and parities give its bytes back, and its parity too.

Letters:
    R  hosts    c  words of a piece
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moejax.collectives.builders import ring_all_reduce, xor_parity
from moejax.collectives.compose import with_combine
from moejax.collectives.lower import run_schedule
from moejax.core.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How to make a tree of its bytes again."""

    treedef: Any
    leaves: tuple[tuple[tuple[int, ...], str], ...]  # shape and dtype

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(s, dtype=np.int64)) * _dtype(d).itemsize for s, d in self.leaves)


def packing_of(tree: Any) -> Packing:
    """Of a tree of arrays or shapes."""
    leaves, treedef = jax.tree.flatten(tree)
    return Packing(
        treedef=treedef, leaves=tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves)
    )


def pack(tree: Any, hosts: int) -> np.ndarray:
    """The bits of a tree of host arrays as uint32 [R - 1, c], filled up with zeros."""
    check(hosts >= 2, f"parity wants at least 2 hosts, got {hosts}")
    raw = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))
    words = -(-len(raw) // 4)
    width = max(1, -(-words // (hosts - 1)))
    filled = raw.ljust(4 * width * (hosts - 1), b"\0")
    return np.frombuffer(filled, np.uint32).reshape(hosts - 1, width)


def unpack(pieces: np.ndarray, packing: Packing) -> Any:
    """The tree again, bit for bit."""
    raw = np.ascontiguousarray(pieces).tobytes()
    check(packing.nbytes <= len(raw), f"{len(raw)} bytes of pieces, the tree has {packing.nbytes}")
    leaves, at = [], 0
    for shape, name in packing.leaves:
        count = int(np.prod(shape, dtype=np.int64))
        leaf = np.frombuffer(raw, _dtype(name), count, at).reshape(shape)
        at += leaf.nbytes
        leaves.append(leaf.copy())
    return packing.treedef.unflatten(leaves)


def make_parity(pieces: jax.Array, axes: dict[str, int]) -> jax.Array:
    """Parity uint32 [1, c] that this host keeps, of pieces [R - 1, c]; inside `shard_map`.

    Cost: R - 1 pieces sent per host, as many bytes as it protects.
    """
    return run_schedule(xor_parity(axes), pieces)[0]


def rebuild(
    pieces: jax.Array, parity: jax.Array, axes: dict[str, int], lost: int
) -> tuple[jax.Array, jax.Array]:
    """Pieces [R - 1, c] and parity [1, c] of host `lost`, on all hosts; inside `shard_map`.

    What the lost host passes in is not read. Cost: an all-reduce of R pieces.
    """
    rank, ranks = lax.axis_index(tuple(axes)), int(np.prod(list(axes.values())))
    check(0 <= lost < ranks, f"lost={lost} is not in 0..{ranks - 1}")
    # Stripe p of host r is its piece for p, and its parity where p is r.
    stripe = jnp.arange(ranks)
    index = jnp.where(stripe < rank, stripe, stripe - 1)
    mine = (stripe == rank)[:, None]
    stripes = jnp.where(mine, parity, pieces.at[index].get(mode="clip"))
    stripes = jnp.where(rank == lost, jnp.uint32(0), stripes)
    schedule = with_combine(ring_all_reduce(axes), "xor")
    total = run_schedule(schedule, stripes)[0]
    others = np.array([p for p in range(ranks) if p != lost])
    return total[others], total[lost : lost + 1]


def _dtype(name: str) -> np.dtype:
    return np.dtype(jnp.dtype(name))
