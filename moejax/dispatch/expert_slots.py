"""Dispatch of slots: experts that choose, or mix, the tokens of each rank.

    fill slots [E, C, D] ─► all-to-all ─► local experts ─► all-to-all back ─► empty them [T, D]

For the gates of `moejax.routing.slot_choice`. Every rank fills C slots of every expert from its own
tokens, so buffers have a static size without slack and nothing overflows. The tokens of a rank are
a group: what they get does not depend on other ranks, but it does on how tokens are spread over
ranks, as in V-MoE (arXiv 2106.05974) and Soft MoE, whose groups are the images of a batch.

Axis letters:
    T  tokens of this rank, a group    E  experts    C  slots of this rank per expert
    R  ranks on the axis    D  model dim
"""

from typing import Any, get_args

import jax
import jax.numpy as jnp

from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.dispatch.exchange import Lowering, check_lowering, exchange
from moejax.dispatch.ranks import Axis, experts_per_rank, total_counts
from moejax.experts.shard import first_expert
from moejax.experts.stage import Stage, StageCounts, resident
from moejax.routing.slot_choice import (
    SlotRouting,
    filled_slots,
    from_slots,
    to_slots,
    unserved_tokens,
)


def expert_slots(
    inner: Stage = resident,
    *,
    num_experts: int,
    axis: Axis | None = "expert",
    token_axes: tuple[str, ...] = ("expert",),
    lowering: Lowering = "native",
) -> Stage:
    """The stage that serves a `SlotRouting` over the ranks of `axis`, None for one device.

    For use inside `shard_map` with tokens and experts sharded over `axis`. `inner` sees one slot
    per row, with rank-local expert ids (`num_experts / R` for an empty slot). Returns rows [T, D].
    Tokens that no expert took are counted as dropped assignments. Raises `InputError` for a
    token-choice routing. Cost: two all-to-alls of E * C * D words (for expert choice c * T * D).
    """
    check_lowering(lowering)
    check(
        axis is not None or not token_axes,
        f"slots without an axis serve tokens of one rank, got token_axes={token_axes}",
    )

    def stage(
        x: jax.Array, routing: Any, weights: Any, layer: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, StageCounts]:
        check(
            isinstance(routing, get_args(SlotRouting)),
            f"dispatch of slots wants a slot routing, got a {type(routing).__name__}",
        )
        ranks, num_local = 1, num_experts
        if axis is not None:
            ranks, num_local = jax.lax.axis_size(axis), experts_per_rank(num_experts, axis, weights)

        def cross(leaf: jax.Array) -> jax.Array:
            return leaf if axis is None else exchange(leaf, axis, lowering)

        with jax.named_scope("moe_dispatch"):
            slots = to_slots(routing, x)
            wanted = jnp.arange(num_experts, dtype=jnp.int32)[:, None]
            ids = cross(jnp.where(filled_slots(routing), wanted, num_experts).reshape(ranks, -1))
            local = jnp.where(ids < num_experts, ids - first_expert(axis, num_local), num_local)
            rows = cross(slots.reshape(ranks, -1, x.shape[1])).reshape(-1, x.shape[1])
        outputs, state, counts = inner(rows, _one_each(local, num_experts), weights, layer, state)
        with jax.named_scope("moe_combine"):
            home = cross(outputs.reshape(ranks, -1, x.shape[1]))
            y = from_slots(routing, home.reshape(slots.shape))
        return y, state, total_counts(counts, token_axes, dropped=unserved_tokens(routing))

    return stage


def _one_each(ids: jax.Array, num_experts: int) -> Routing:
    """The routing of slots: each one choice, of full weight."""
    return Routing(
        topk_idx=ids.reshape(-1, 1),
        topk_weights=jnp.ones((ids.size, 1), jnp.float32),
        router_logits=jnp.zeros((0, num_experts), jnp.float32),
    )
