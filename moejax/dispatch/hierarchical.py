"""Hierarchical de-duplicated dispatch: a token crosses each level of links once per destination.

    level 1 (slowest links): to every outer group that holds one of its experts, once
    level 2: from there to every inner group, once ... ─► local experts
    and back the same way: weighted partial sums, added up at every hop

HierMoE (arXiv 2508.09591, section III): with K experts per token a flat all-to-all sends K copies,
of which many cross the same slow link. One level over all axes is the flat de-duplicated
all-to-all; levels collapse by naming a tuple of axes.

Axis letters:
    T  tokens of this rank    M  rows at a level    K  experts per token    E  experts
    U  groups of a level and all above it    G  destinations of a level    C  slots per destination
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.costmodel.hierarchy import touched_share
from moejax.dispatch.exchange import Lowering, check_lowering, exchange
from moejax.dispatch.ranks import (
    Axis,
    axis_names,
    combined,
    experts_per_rank,
    own_choices,
    total_counts,
)
from moejax.dispatch.slots import FITS_ALL, Capacity, Slots, assign_slots, collect, pack
from moejax.experts.stage import Stage, StageCounts, resident


@struct.dataclass(kw_only=True)
class Sent:
    """The way of the tokens that arrived here, and what it cost. Leaves have one entry per level.

    `rows` counts what this rank sent, to itself included: summed over ranks and without drops it is
    the number of pairs of a token and a group that holds one of its experts.
    """

    slots: tuple[Slots, ...]
    rows: jax.Array  # int32 [levels]
    dropped: jax.Array  # int32 [levels], assignments


def expected_rows(num_tokens: int, num_experts: int, top_k: int, groups: int) -> float:
    """Expected (token, group) pairs of tokens that take distinct experts uniformly at random.

    >>> round(expected_rows(1, 64, 8, 4), 2), expected_rows(3, 64, 1, 4)
    (3.68, 3.0)
    """
    return num_tokens * groups * touched_share(num_experts, top_k, groups)


def send(
    x: jax.Array,
    routing: Routing,
    *,
    num_experts: int,
    levels: tuple[Axis, ...],
    capacities: tuple[Capacity, ...],
    lowering: Lowering = "native",
) -> tuple[jax.Array, Routing, Sent]:
    """Tokens to the ranks of all their experts, level by level, inside `shard_map`.

    Returns rows [M, D], their choices with global ids (E for those served elsewhere), and the way.
    """
    tokens, top_k = routing.topk_idx.shape
    sizes = [jax.lax.axis_size(level) for level in levels]
    idx, weights, ways, rows, dropped = routing.topk_idx, routing.topk_weights, [], [], []
    for i, (level, size, capacity) in enumerate(zip(levels, sizes, capacities, strict=True)):
        expected = expected_rows(tokens, num_experts, top_k, math.prod(sizes[: i + 1])) / size
        slots_each = capacity.resolve(expected=expected, bound=x.shape[0])
        with jax.named_scope(f"moe_dispatch_level_{i}"):
            group = _destination(idx, num_experts, sizes, i)
            same = group[:, :, None] == group[:, None, :]
            first = ~jnp.any(jnp.tril(same, -1), axis=2)
            slots, overflow = assign_slots(jnp.where(first, group, size), size, slots_each)
            lost = jnp.any(same & overflow[:, None, :], axis=2)
            ways.append(slots)
            rows.append(jnp.sum(slots.slot < size * slots_each, dtype=jnp.int32))
            dropped.append(jnp.sum(lost, dtype=jnp.int32))
            x, idx, weights = _cross(x, idx, weights, slots, level, num_experts, lowering)
            idx = jnp.where(
                _destination(idx, num_experts, sizes, i) == jax.lax.axis_index(level),
                idx,
                num_experts,
            )
    sent = Sent(slots=tuple(ways), rows=jnp.stack(rows), dropped=jnp.stack(dropped))
    arrived = Routing(topk_idx=idx, topk_weights=weights, router_logits=routing.router_logits)
    return x, arrived, sent


def bring_back(
    y: jax.Array, sent: Sent, *, levels: tuple[Axis, ...], lowering: Lowering = "native"
) -> jax.Array:
    """Partial sums y [M, D] home, added up at every hop: [T, D], in y's dtype."""
    for i, (level, slots) in reversed(list(enumerate(zip(levels, sent.slots, strict=True)))):
        with jax.named_scope(f"moe_combine_level_{i}"):
            rows = y.reshape(jax.lax.axis_size(level), -1, y.shape[1])
            y = collect(exchange(rows, level, lowering).reshape(y.shape), slots)
    return y


def hierarchical(
    inner: Stage = resident,
    *,
    num_experts: int,
    levels: tuple[Axis, ...] = ("expert",),
    token_axes: tuple[str, ...] = ("expert",),
    capacity: Capacity | tuple[Capacity, ...] = FITS_ALL,
    lowering: Lowering = "native",
) -> Stage:
    """The stage that sends each token once per destination group and level.

    For use inside `shard_map` with tokens and experts sharded over all axes of `levels`, outermost
    (slowest links) first, in the order of the mesh. `inner` sees the rows that arrived. Returns
    combined rows [T, D]; partial sums travel in x's dtype and are added in float32.

    Args:
        capacity: rows per sender and destination of a level, one for all levels or one for each; a
            factor is over the rows that uniform routing would send (`expected_rows`).
            `FITS_ALL` drops nothing, in buffers of T rows per rank of the levels so far.

    Cost: per level two all-to-alls of G * C * D words, and one of 2 * G * C * K.
    """
    check(len(levels) >= 1, "a hierarchy wants at least one level of mesh axes")
    capacities = (capacity,) * len(levels) if isinstance(capacity, Capacity) else tuple(capacity)
    check(
        len(capacities) == len(levels),
        f"{len(capacities)} capacities for {len(levels)} levels {levels}",
    )
    check_lowering(lowering)
    axis = sum((axis_names(level) for level in levels), ())

    def stage(
        x: jax.Array, routing: Routing, weights: Any, layer: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, StageCounts]:
        num_local = experts_per_rank(num_experts, axis, weights)
        way = dict[str, Any](levels=levels, lowering=lowering)
        rows, arrived, sent = send(
            x, routing, num_experts=num_experts, capacities=capacities, **way
        )
        width = min(routing.topk_idx.shape[1], num_local)
        local, _ = own_choices(arrived, axis, num_local, width=width)
        outputs, state, counts = inner(rows, local, weights, layer, state)
        partial = combined(outputs, local.topk_weights).astype(x.dtype)
        y = bring_back(partial, sent, **way)
        return y, state, total_counts(counts, token_axes, dropped=jnp.sum(sent.dropped))

    return stage


def _destination(idx: jax.Array, num_experts: int, sizes: list[int], level: int) -> jax.Array:
    """int32 [M, K]: coordinate along a level of the rank of each choice; its size for none."""
    below = num_experts // math.prod(sizes[: level + 1])
    return jnp.where(idx < num_experts, idx // below % sizes[level], sizes[level])


def _cross(
    x: jax.Array,
    idx: jax.Array,
    weights: jax.Array,
    slots: Slots,
    level: Axis,
    num_experts: int,
    lowering: Lowering,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows, ids and weights to the other side of a level."""
    size = jax.lax.axis_size(level)
    ids = idx.at[slots.source // idx.shape[1]].get(mode="fill", fill_value=num_experts)

    def move(leaf: jax.Array) -> jax.Array:
        there = exchange(leaf.reshape(size, -1, leaf.shape[1]), level, lowering)
        return there.reshape(leaf.shape)

    return move(pack(x, slots)), move(ids), move(pack(weights, slots))
