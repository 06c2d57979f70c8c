"""Experts on slots of equal number: one batched product, no sorting, empty slots computed too.

What the all-to-all with a capacity per expert delivers (GShard, arXiv 2006.16668): rows stand in
the order [senders, experts, slots], so the position says which expert a row is for. Static shapes
throughout, which compilers overlap with collectives; the price is the slack of the capacity.

Axis letters:
    R  senders    E  experts of this rank    C  slots per sender and expert    D  model dim
"""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.experts.gated import gated_mlp
from moejax.experts.stage import Stage, StageCounts, resident_counts
from moejax.kernels.grouped_ffn import GatedWeights


def slotted(senders: int) -> Stage:
    """The inner stage of `dispatch.all_to_all(per="expert")` over `senders` ranks.

    Takes rows [R * E * C, D] with one choice each; those of empty slots are zero and stay zero.
    Raises `InputError` when the rows do not divide. Cost: R * E * C rows of a gated MLP.
    """

    def stage(
        x: jax.Array,
        routing: Routing,
        weights: GatedWeights | None,
        layer: jax.Array,
        state: Any,
    ) -> tuple[jax.Array, Any, StageCounts]:
        assert weights is not None, "the slotted stage wants the layer's experts"
        del layer
        experts, (rows, model_dim) = weights.w_gate.shape[0], x.shape
        check(
            routing.topk_idx.shape[1] == 1 and rows % (senders * experts) == 0,
            f"{rows} rows with {routing.topk_idx.shape[1]} choices are not slots of {senders} "
            f"senders and {experts} experts",
        )
        with jax.named_scope("moe_experts"):
            slots = x.reshape(senders, experts, -1, model_dim).swapaxes(0, 1)
            outputs = jax.vmap(gated_mlp)(weights, slots.reshape(experts, -1, model_dim))
            outputs = outputs.reshape(experts, senders, -1, model_dim).swapaxes(0, 1)
        ids = jnp.arange(experts, dtype=jnp.int32)
        group_sizes = (routing.topk_idx == ids[None]).sum(0, dtype=jnp.int32)
        return outputs.reshape(rows, 1, model_dim), state, resident_counts(group_sizes)

    return stage
