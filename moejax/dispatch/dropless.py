"""A capacity that never drops: what overflowed anywhere is computed again by a dropless dispatch.

    dispatch with capacity ─► dropped anywhere? ─► no: done    yes: fallback for all tokens

The common case is straight-line code that overlaps with its surroundings; only the fallback stands
inside the conditional. The count of drops is a sum over all ranks, so all take the same branch.

Axis letters:
    T  tokens of this rank    K  experts per token    D  model dim
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core.structs import Routing
from moejax.dispatch.ranks import combined, without_logits
from moejax.experts.stage import Stage, StageCounts


def dropless(stage: Stage, fallback: Stage) -> Stage:
    """The stage that runs `stage`, and `fallback` instead where any rank dropped an assignment.

    Both are dispatches over the same mesh axes, whose counts are totals of all ranks. Returns
    combined rows [T, D]. `waves` tells: it counts those of both where the fallback ran. Cost: that
    of `stage`, and of `fallback` on top when anything overflowed.
    """

    def run(
        x: jax.Array, routing: Routing, weights: Any, layer: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, StageCounts]:
        routing = without_logits(routing)

        def finish(served: Stage, state: Any):
            outputs, state, counts = served(x, routing, weights, layer, state)
            return combined(outputs, routing.topk_weights).astype(x.dtype), state, counts

        y, state, counts = finish(stage, state)

        def again(y: jax.Array, state: Any, counts: StageCounts):
            del y
            y, state, more = finish(fallback, state)
            total = jax.tree.map(jnp.add, counts, more)
            return (
                y,
                state,
                dataclasses.replace(total, assignments_dropped=more.assignments_dropped),
            )

        def keep(y: jax.Array, state: Any, counts: StageCounts):
            return y, state, counts

        with jax.named_scope("moe_fallback"):
            return jax.lax.cond(counts.assignments_dropped > 0, again, keep, y, state, counts)

    return run
