"""Experts from slot to slot over the ranks of a mesh axis, to the bit, inside `shard_map`.

Where they go is data: one program serves every move. `move_rows` rearranges a layer and costs what
has to travel; `swap_rows` exchanges a few pairs in one collective, cheap enough for every few steps
(HierMoE, arXiv 2508.09591, section IV). Bytes travel, not numbers: NaNs and signs of zeros survive.

Axis letters:
    R  ranks on the axis    P  slots before    Q  slots after    L  layers    m  swaps
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moejax.core.errors import check
from moejax.core.structs import ExpertPlacement
from moejax.dispatch.exchange import exchange
from moejax.dispatch.ranks import Axis
from moejax.experts.shard import first_expert


def sources(old: ExpertPlacement, new: ExpertPlacement, ranks: int) -> jax.Array:
    """int32 [Q]: the slot of `old` that each slot of `new` is filled from, for one layer.

    The slot itself where it holds the expert already, else one on the same rank, else copies in
    turn.
    """
    experts = jnp.asarray(new.phys_to_log)
    copies = jnp.asarray(old.log_to_phys)[experts]  # [Q, C]
    slot = jnp.arange(new.num_slots, dtype=jnp.int32)[:, None]
    rank = slot // (new.num_slots // ranks)
    near = copies // (old.num_slots // ranks) == rank
    count = jnp.asarray(old.num_replicas)[experts][:, None]
    column = jnp.arange(copies.shape[1], dtype=jnp.int32)[None]
    distance = 2 + (column - rank) % count
    distance = jnp.where(copies == slot, 0, jnp.where(near, 1, distance))
    distance = jnp.where(copies < 0, jnp.iinfo(jnp.int32).max, distance)
    best = jnp.argmin(distance, axis=1)
    return jnp.take_along_axis(copies, best[:, None], axis=1)[:, 0]


def move_rows(rows: Any, source: jax.Array, axis: Axis) -> Any:
    """One layer's experts, leaves [P / R, ...] -> [Q / R, ...], from slots `source` (int32 [Q]).

    What stays on its rank is copied. Everything else arrives in rounds, one expert on every rank,
    as many as the rank with most arrivals needs. Cost per round: an all-to-all of one expert per
    pair of ranks, in pieces so that buffers are about two experts of one leaf.
    """
    ranks, rank = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    per_rank = jax.tree.leaves(rows)[0].shape[0]
    first = first_expert(axis, per_rank)
    source = source.reshape(ranks, -1)  # [R, Q / R]
    arrives = source // per_rank != jnp.arange(ranks, dtype=jnp.int32)[:, None]
    counts = arrives.sum(1, dtype=jnp.int32)
    order = jnp.argsort(~arrives, axis=1, stable=True).astype(jnp.int32)
    queue = jnp.take_along_axis(source, order, axis=1)  # arrivals of every rank first

    def move(leaf: jax.Array) -> jax.Array:
        num_pieces = pieces_of(leaf.shape[1:], ranks)
        cut = leaf.reshape(per_rank, num_pieces, -1, *leaf.shape[2:])

        def arrive(step: jax.Array, moved: jax.Array) -> jax.Array:
            i, piece = step // num_pieces, step % num_pieces
            wanted = queue[:, i]
            sent = _get(cut[:, piece], wanted - first)  # [R, ...], one piece for every rank
            got = exchange(sent, axis)[wanted[rank] // per_rank]
            target = jnp.where(i < counts[rank], order[rank, i], source.shape[1])
            return moved.at[target, piece].set(got, mode="drop")

        kept = _get(cut, source[rank] - first)
        moved = jax.lax.fori_loop(0, counts.max() * num_pieces, arrive, kept)
        return moved.reshape(-1, *leaf.shape[1:])

    with jax.named_scope("moe_move_experts"):
        return jax.tree.map(move, rows)


def pieces_of(shape: tuple[int, ...], ranks: int) -> int:
    """Into how many pieces an expert's leaf of `shape` is cut: at most `ranks`, equal ones.

    >>> pieces_of((7168, 2048), 64), pieces_of((6, 2), 4), pieces_of((), 4)
    (64, 3, 1)
    """
    size = shape[0] if shape else 1
    return max(n for n in range(1, ranks + 1) if size % n == 0)


@struct.dataclass(kw_only=True)
class Swaps:
    """Pairs of slots that change contents, int32 [m] each; no (layer, slot) occurs twice."""

    layers: jax.Array | np.ndarray
    a: jax.Array | np.ndarray
    b: jax.Array | np.ndarray


def swap_rows(stacks: list[tuple[int, Any]], swaps: Swaps, axis: Axis) -> list[tuple[int, Any]]:
    """Experts of pairs of slots exchanged, in stacks (first layer, leaves [L, P / R, ...]).

    Cost: one all-reduce of 2 m experts, whatever L and P are: the leaves of an expert are packed
    into words of 32 bits, and summed with zeros from all ranks but the owner.
    """
    layers = jnp.concatenate([jnp.asarray(swaps.layers)] * 2)
    slots = jnp.concatenate([jnp.asarray(swaps.a), jnp.asarray(swaps.b)])
    filled = jnp.concatenate([jnp.asarray(swaps.b), jnp.asarray(swaps.a)])

    def places(first: int, leaf: jax.Array, slots: jax.Array) -> jax.Array:
        """Rows of a leaf [L * P / R, ...]; their number for layers and slots that lie elsewhere."""
        depth, per_rank = leaf.shape[:2]
        layer, slot = layers - first, slots - first_expert(axis, per_rank)
        inside = (layer >= 0) & (layer < depth) & (slot >= 0) & (slot < per_rank)
        return jnp.where(inside, layer * per_rank + slot, depth * per_rank)

    def pick(first: int, leaf: jax.Array) -> jax.Array:
        flat = leaf.reshape(-1, *leaf.shape[2:])
        return _get(flat, places(first, leaf, slots))

    def fill(first: int, leaf: jax.Array, rows: jax.Array) -> jax.Array:
        flat = leaf.reshape(-1, *leaf.shape[2:])
        flat = flat.at[places(first, leaf, filled)].set(rows, mode="drop")
        return flat.reshape(leaf.shape)

    with jax.named_scope("moe_swap_experts"):
        picked = [jax.tree.map(lambda x, f=first: pick(f, x), tree) for first, tree in stacks]
        words = [_pack(jax.tree.leaves(rows)) for rows in picked]
        # A layer is in one stack and zero in the others, so that all fit into one message.
        width = max(one.shape[1] for one in words)
        message = sum(jnp.pad(one, ((0, 0), (0, width - one.shape[1]))) for one in words)
        message = jax.lax.psum(message, axis)
        moved = [_unpack(message, rows) for rows in picked]
        return [
            (first, jax.tree.map(lambda x, r, f=first: fill(f, x, r), tree, rows))
            for (first, tree), rows in zip(stacks, moved, strict=True)
        ]


def _get(leaf: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a leaf; zeros for an index outside, negative ones too."""
    index = jnp.where((index >= 0) & (index < leaf.shape[0]), index, leaf.shape[0])
    return leaf.at[index].get(mode="fill", fill_value=0)


def _pack(leaves: list[jax.Array]) -> jax.Array:
    """uint32 [n, words] of leaves [n, ...].

    Values of 2 bytes share a word with one of the other half of their row, values of 1 byte with
    the other quarters. Sharing with neighbours takes minutes to compile for TPU.
    """
    packed = []
    for leaf in leaves:
        bits = jax.lax.bitcast_convert_type(leaf, _unsigned(leaf.dtype))
        bits = bits.reshape(leaf.shape[0], -1).astype(jnp.uint32)
        lanes, width = _lanes(leaf.dtype)
        bits = jnp.pad(bits, ((0, 0), (0, -bits.shape[1] % lanes)))
        parts = jnp.split(bits, lanes, axis=1)
        shifted = [part << jnp.uint32(i * width) for i, part in enumerate(parts)]
        packed.append(functools.reduce(jnp.bitwise_or, shifted))
    return jnp.concatenate(packed, axis=1)


def _unpack(words: jax.Array, like: Any) -> Any:
    """The leaves of `like` out of the first words that `_pack` made of such leaves."""
    leaves, tree = jax.tree.flatten(like)
    start, out = 0, []
    for leaf in leaves:
        lanes, width = _lanes(leaf.dtype)
        size = math.prod(leaf.shape[1:])
        end = start + -(-size // lanes)
        parts = [words[:, start:end] >> jnp.uint32(i * width) for i in range(lanes)]
        bits = jnp.concatenate(parts, axis=1)[:, :size].astype(_unsigned(leaf.dtype))
        out.append(jax.lax.bitcast_convert_type(bits.reshape(leaf.shape), leaf.dtype))
        start = end
    return jax.tree.unflatten(tree, out)


def _unsigned(dtype: Any) -> Any:
    size = jnp.dtype(dtype).itemsize
    check(size in (1, 2, 4), f"experts of {size} bytes per value ({dtype}) cannot be swapped")
    return {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]


def _lanes(dtype: Any) -> tuple[int, int]:
    """Values per word, bits per value."""
    size = jnp.dtype(dtype).itemsize
    return 4 // size, 8 * size
