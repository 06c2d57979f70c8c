"""What all strategies share: names of the expert axis, counts of all ranks, choices of one rank.

Axis letters:
    T  tokens    K  experts per token    E  experts    R  ranks on the axis    D  model dim
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.experts.combine import combine
from moejax.experts.shard import first_expert
from moejax.experts.stage import StageCounts

Axis: TypeAlias = str | tuple[str, ...]


def axis_names(axis: Axis) -> tuple[str, ...]:
    """One or several names, as a tuple."""
    return (axis,) if isinstance(axis, str) else axis


def experts_per_rank(num_experts: int, axis: Axis, weights: Any) -> int:
    """E / R inside `shard_map`.

    Raises `InputError` when they do not divide, when the axes are not in the order of the mesh (in
    which arrays are split over them), and when the weights, where there are any, are of another
    number of experts.
    """
    names, order = axis_names(axis), jax.sharding.get_abstract_mesh().axis_names
    places = [order.index(name) for name in names if name in order]
    check(places == sorted(places), f"axes {names} are not in the order of the mesh, {order}")
    ranks = jax.lax.axis_size(axis)
    check(
        num_experts % ranks == 0,
        f"num_experts={num_experts} is not divisible by the {ranks} ranks of axis {axis}",
    )
    for leaf in jax.tree.leaves(weights):
        check(
            leaf.shape[0] * ranks == num_experts,
            f"num_experts={num_experts} over {ranks} ranks, the weights hold {leaf.shape[0]} "
            f"experts on each",
        )
    return num_experts // ranks


def total_counts(
    counts: StageCounts, token_axes: tuple[str, ...], *, dropped: jax.Array | None = None
) -> StageCounts:
    """Counts of all ranks, `dropped` assignments of this rank included; waves of the slowest."""
    if dropped is not None:
        counts = dataclasses.replace(
            counts, assignments_dropped=counts.assignments_dropped + dropped.astype(jnp.int32)
        )
    waves = jax.lax.pmax(counts.waves, token_axes)
    return dataclasses.replace(jax.lax.psum(counts, token_axes), waves=waves)


def without_logits(routing: Routing) -> Routing:
    """The part of a routing that experts need; logits do not travel."""
    return dataclasses.replace(routing, router_logits=routing.router_logits[:0])


def local_choices(routing: Routing, topk_idx: jax.Array, topk_weights: jax.Array) -> Routing:
    """What an inner stage is given: other rows, other ids, and no logits."""
    bare = without_logits(routing)
    return dataclasses.replace(bare, topk_idx=topk_idx, topk_weights=topk_weights)


def own_choices(
    routing: Routing, axis: Axis, num_local: int, *, width: int
) -> tuple[Routing, jax.Array]:
    """The choices that this rank serves, moved to the front and cut to `width` per token.

    A token takes distinct experts, so `min(K, E / R)` columns always suffice, and K / R times the
    rows are sorted and computed instead of K. Returns the routing [T, width] with local ids
    (`num_local` for none), and the int32 count of choices that did not fit.
    """
    idx, weights = routing.topk_idx - first_expert(axis, num_local), routing.topk_weights
    own = (idx >= 0) & (idx < num_local)
    idx = jnp.where(own, idx, num_local)
    if width >= idx.shape[1]:
        return local_choices(routing, idx, weights), jnp.int32(0)
    order = jnp.argsort(~own, axis=1, stable=True)[:, :width]
    idx, weights = (jnp.take_along_axis(leaf, order, axis=1) for leaf in (idx, weights))
    lost = jnp.sum(own, dtype=jnp.int32) - jnp.sum(idx < num_local, dtype=jnp.int32)
    return local_choices(routing, idx, weights), lost


def combined(outputs: jax.Array, topk_weights: jax.Array) -> jax.Array:
    """float32 [T, D] of what a stage returned: summed over k unless it did so itself."""
    outputs = outputs.astype(jnp.float32)
    return outputs if outputs.ndim == 2 else combine(outputs, topk_weights)
