"""Ragged all-to-all dispatch: assignments sorted by expert travel in pieces of any size.

    sort by expert ─► ragged all-to-all ─► local experts ─► ragged all-to-all back ─► unsort

What is on the wire is what is wanted, no slot is padded; only the landing buffer has a static
size. `jax.lax.ragged_all_to_all` exists on TPU and GPU. XLA:CPU has none, and the emulation there
(all-gather, then pick) is exact in values and gradients, not in bytes.

Axis letters:
    T  tokens of this rank    K  experts per token    N  assignments, T * K    E  experts
    R  ranks on the axis    B  rows of the landing buffer    D  model dim
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.dispatch.ranks import Axis, experts_per_rank, local_choices, total_counts
from moejax.dispatch.slots import FITS_ALL, Capacity
from moejax.experts.stage import Stage, StageCounts, resident
from moejax.kernels.permute import permute, sort_by_group, ungroup
from moejax.kernels.vma import vary_together

Lowering = Literal["auto", "native", "emulated", "dma"]
LOWERINGS: tuple[str, ...] = get_args(Lowering)


@struct.dataclass(kw_only=True)
class Pieces:
    """One piece from every rank to every other, all int32 [R, R] by (sender, receiver)."""

    sizes: jax.Array  # rows
    sent_at: jax.Array  # where the piece starts in the sender's rows
    lands_at: jax.Array  # where it starts in the receiver's buffer

    def reversed(self) -> "Pieces":
        """The way home."""
        return Pieces(sizes=self.sizes.T, sent_at=self.lands_at.T, lands_at=self.sent_at.T)


def ragged(
    inner: Stage = resident,
    *,
    num_experts: int,
    axis: Axis = "expert",
    token_axes: tuple[str, ...] = ("expert",),
    capacity: Capacity = FITS_ALL,
    lowering: Lowering = "auto",
) -> Stage:
    """The stage that sends assignments by ragged all-to-all, for use inside `shard_map`.

    Outputs come back apart, [T, K, D]: without drops bit-equal to one device.

    Args:
        capacity: rows of the landing buffer; a factor is over T * K. `FITS_ALL` reserves
            R * T * min(K, E / R). A full buffer drops, and counts, the last experts of the last
            senders.
        lowering: `auto` takes the emulation on CPU and the native collective elsewhere; `dma` is
            one TPU kernel (`moejax.collectives.ragged_dma`), interpreted on CPU.

    Cost: two ragged all-to-alls of N * D words, an all-gather of R * E counts.
    """
    check(lowering in LOWERINGS, f"lowering={lowering!r} is not one of {LOWERINGS}")

    def stage(
        x: jax.Array, routing: Routing, weights: Any, layer: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, StageCounts]:
        num_local, ranks = experts_per_rank(num_experts, axis, weights), jax.lax.axis_size(axis)
        tokens, top_k = routing.topk_idx.shape
        bound = ranks * tokens * min(top_k, num_local)
        rows = capacity.resolve(expected=tokens * top_k, bound=bound)
        with jax.named_scope("moe_dispatch"):
            perm = sort_by_group(routing.topk_idx, num_experts)
            counts = jax.lax.all_gather(perm.group_sizes, axis).reshape(ranks, ranks, num_local)
            pieces = cut_pieces(counts.sum(2), rows)
            sorted_rows = permute(x, perm, top_k)
            landed = ragged_exchange(sorted_rows, pieces, rows, axis, lowering)
            ids = landed_experts(counts, pieces, rows, jax.lax.axis_index(axis))[:, None]
        arrived = local_choices(routing, ids, jnp.ones(ids.shape, jnp.float32))
        outputs, state, inner_counts = inner(landed, arrived, weights, layer, state)
        with jax.named_scope("moe_combine"):
            served = outputs.reshape(rows, -1)
            home = ragged_exchange(served, pieces.reversed(), tokens * top_k, axis, lowering)
            y = ungroup(home, perm, top_k)
        sent = pieces.sizes[jax.lax.axis_index(axis)].sum()
        dropped = perm.group_sizes.sum() - sent
        return y, state, total_counts(inner_counts, token_axes, dropped=dropped)

    return stage


def cut_pieces(sizes: jax.Array, rows: int) -> Pieces:
    """Pieces of int32 [R, R] `sizes`, cut where a receiver's buffer of `rows` is full."""
    lands_at = jnp.minimum(jnp.cumsum(sizes, axis=0) - sizes, rows)
    kept = jnp.clip(rows - lands_at, 0, sizes)
    return Pieces(sizes=kept, sent_at=jnp.cumsum(sizes, axis=1) - sizes, lands_at=lands_at)


def landed_experts(counts: jax.Array, pieces: Pieces, rows: int, rank: jax.Array) -> jax.Array:
    """int32 [rows]: local expert of each landed row, E / R for those past the last piece.

    `counts` [R, R, E / R] are the assignments of every sender to every expert.
    """
    mine = counts[:, rank]  # [R, E / R], in the order in which the rows lie
    num_local = mine.shape[1]
    ends = jnp.cumsum(mine.reshape(-1))
    row = jnp.arange(rows, dtype=jnp.int32)
    piece = jnp.searchsorted(ends, row, side="right", method="compare_all").astype(jnp.int32)
    return jnp.where(row < pieces.sizes[:, rank].sum(), piece % num_local, num_local)


def ragged_exchange(
    x: jax.Array, pieces: Pieces, rows: int, axis: Axis, lowering: Lowering = "auto"
) -> jax.Array:
    """Pieces of x [N, D] to their ranks: [rows, D], zero where nothing lands."""
    if lowering == "dma":
        from moejax.collectives.ragged_dma import ragged_all_to_all_dma  # Pallas: long to import

        return _native(x, pieces, rows, axis, ragged_all_to_all_dma)
    if lowering == "native":
        return _native(x, pieces, rows, axis)
    if lowering == "emulated":
        return _emulated(x, pieces, rows, axis)
    return jax.lax.platform_dependent(
        x,
        pieces,
        cpu=lambda x, pieces: _emulated(x, pieces, rows, axis),
        default=lambda x, pieces: _native(x, pieces, rows, axis),
    )


def _native(
    x: jax.Array,
    pieces: Pieces,
    rows: int,
    axis: Axis,
    collective: Callable[..., jax.Array] = jax.lax.ragged_all_to_all,
) -> jax.Array:
    rank = jax.lax.axis_index(axis)
    x, buffer = vary_together(x, jnp.zeros((rows, x.shape[1]), x.dtype))
    return collective(
        x,
        buffer,
        pieces.sent_at[rank],
        pieces.sizes[rank],
        pieces.lands_at[rank],
        pieces.sizes[:, rank],
        axis_name=axis,
    )


def _emulated(x: jax.Array, pieces: Pieces, rows: int, axis: Axis) -> jax.Array:
    rank = jax.lax.axis_index(axis)
    everything = jax.lax.all_gather(x, axis, tiled=True)  # [R * N, D]
    starts, sizes = pieces.lands_at[:, rank], pieces.sizes[:, rank]
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    inside = (row >= starts[None]) & (row < (starts + sizes)[None])  # [rows, R]
    sender = jnp.argmax(inside, axis=1).astype(jnp.int32)
    source = sender * x.shape[0] + pieces.sent_at[sender, rank] + row[:, 0] - starts[sender]
    source = jnp.where(inside.any(1), source, everything.shape[0])
    return everything.at[source].get(mode="fill", fill_value=0)
