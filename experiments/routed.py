"""An expert stage on choices that are given: what programs about dispatch compile and time."""

import jax
import jax.numpy as jnp

from moejax.core.structs import Routing
from moejax.dispatch.ranks import combined
from moejax.experts.stage import Stage
from moejax.kernels.grouped_ffn import GatedWeights


def serve_routed(
    stage: Stage,
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    experts: GatedWeights,
) -> tuple[jax.Array, jax.Array]:
    """(y [T, D], assignments dropped) for tokens x [T, D] and their choices [T, K]."""
    logits = jnp.zeros_like(topk_weights)
    routing = Routing(topk_idx=topk_idx, topk_weights=topk_weights, router_logits=logits)
    outputs, _, counts = stage(x, routing, experts, jnp.int32(0), None)
    return combined(outputs, topk_weights), counts.assignments_dropped
