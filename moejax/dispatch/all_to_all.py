"""All-to-all dispatch with capacities: every assignment travels to its expert's rank and back.

    slots ─► all-to-all of rows and ids ─► local experts ─► all-to-all back ─► outputs [T, K, D]

The classic of GShard (arXiv 2006.16668) and Switch (arXiv 2101.03961): buffers have a static size,
and what does not fit is dropped, first come, first served in token order, and counted. A token
that wants several experts of a rank travels several times; `hierarchical` sends it once.

Axis letters:
    T  tokens of this rank    K  experts per token    E  experts    R  ranks on the axis
    C  slots of this rank per expert, or per rank    D  model dim
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.dispatch.exchange import Lowering, check_lowering, exchange
from moejax.dispatch.ranks import (
    Axis,
    experts_per_rank,
    local_choices,
    total_counts,
)
from moejax.dispatch.slots import QUARTER_MORE, Capacity, assign_slots, pack, spread
from moejax.experts.shard import first_expert
from moejax.experts.stage import Stage, StageCounts, resident

Per = Literal["expert", "rank"]


def slots_per_group(
    num_tokens: int, top_k: int, num_experts: int, ranks: int, capacity: Capacity, per: Per
) -> int:
    """C: slots that one rank has per expert (or per rank) for its own `num_tokens` tokens.

    >>> slots_per_group(512, 8, 64, 8, Capacity(factor=1.25), "expert")
    80
    """
    groups = num_experts if per == "expert" else ranks
    bound = num_tokens if per == "expert" else num_tokens * min(top_k, num_experts // ranks)
    return capacity.resolve(expected=num_tokens * top_k / groups, bound=bound)


def all_to_all(
    inner: Stage = resident,
    *,
    num_experts: int,
    axis: Axis = "expert",
    token_axes: tuple[str, ...] = ("expert",),
    capacity: Capacity = QUARTER_MORE,
    per: Per = "expert",
    lowering: Lowering = "native",
) -> Stage:
    """The stage that sends assignments to the ranks of `axis` that hold their experts.

    For use inside `shard_map` with tokens and experts sharded over `axis`. `inner` sees the slots
    that arrived, one assignment per row. Outputs come back apart, [T, K, D], so that without drops
    the combine is that of one device, to the bit.

    Args:
        capacity: slots per sender and expert; a factor is over T * K / E. `FITS_ALL` drops nothing.
        per: `rank` pools the slots of a rank's experts, which drops less at the same size.
        lowering: see `exchange`.

    Cost: two all-to-alls of E * C * D words (R * C * D with `per="rank"`).
    """
    check(per in get_args(Per), f"per={per!r} is neither expert nor rank")
    check_lowering(lowering)

    def stage(
        x: jax.Array, routing: Routing, weights: Any, layer: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, StageCounts]:
        num_local, ranks = experts_per_rank(num_experts, axis, weights), jax.lax.axis_size(axis)
        (tokens, top_k), model_dim = routing.topk_idx.shape, x.shape[1]
        size = slots_per_group(tokens, top_k, num_experts, ranks, capacity, per)
        with jax.named_scope("moe_dispatch"):
            groups = num_experts if per == "expert" else ranks
            group = routing.topk_idx // (num_experts // groups)
            slots, overflow = assign_slots(group, groups, size)
            rows = exchange(pack(x, slots).reshape(ranks, -1, model_dim), axis, lowering)
            sent = routing.topk_idx.reshape(-1).at[slots.source]
            ids = sent.get(mode="fill", fill_value=num_experts).reshape(ranks, -1)
            ids = exchange(ids, axis, lowering).reshape(-1, 1)
            local = jnp.where(ids < num_experts, ids - first_expert(axis, num_local), num_local)
        arrived = local_choices(routing, local, jnp.ones(local.shape, jnp.float32))
        outputs, state, counts = inner(rows.reshape(-1, model_dim), arrived, weights, layer, state)
        with jax.named_scope("moe_combine"):
            home = exchange(outputs.reshape(ranks, -1, model_dim), axis, lowering)
            y = spread(home.reshape(-1, model_dim), slots)
        return y, state, total_counts(counts, token_axes, dropped=jnp.sum(overflow))

    return stage
