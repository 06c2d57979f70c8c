"""Structs that travel between packages. Leaves may be arrays, specs or ShapeDtypeStructs.

Axis letters:
    T  tokens on this shard      K  experts per token      E  experts      L  MoE layers
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass(kw_only=True)
class Routing:
    """Token-choice routing: where each token goes and with what weight.

    A padded token has `topk_idx == E` (one past the last expert) and weight 0: it belongs to no
    group, costs nothing and its output row is zero.
    """

    topk_idx: jax.Array  # int32 [T, K]
    topk_weights: jax.Array  # float32 [T, K]
    router_logits: jax.Array  # float32 [T, E]


@struct.dataclass(kw_only=True)
class MoEMetrics:
    """What one MoE layer did; stacked to a leading [L] by the scan over layers.

    Lookups and transfers are summed over ranks and counted in whole experts; multiply by the bytes
    of one expert for bytes. Transfers are zero on a resident layer.
    """

    expert_load: jax.Array  # int32 [E], assignments per expert
    assignments_dropped: jax.Array  # int32 []
    load_balancing_loss: jax.Array  # float32 [], 1.0 when balanced
    router_z_loss: jax.Array  # float32 []
    lookups: jax.Array  # int32 [], distinct experts wanted
    hits: jax.Array  # int32 [], wanted experts that needed no demand fetch
    demand_fetches: jax.Array  # int32 [], experts fetched because they were missing
    prefetches: jax.Array  # int32 [], experts fetched for this layer ahead of time
    prefetches_wasted: jax.Array  # int32 [], of those, the ones this layer did not use
    waves: jax.Array  # int32 [], rounds of fetch and compute of the slowest rank


def zero_metrics(num_experts: int) -> MoEMetrics:
    """Metrics of a layer that did nothing."""
    zero, flat = jnp.int32(0), jnp.float32(0)
    return MoEMetrics(
        expert_load=jnp.zeros((num_experts,), jnp.int32),
        assignments_dropped=zero,
        load_balancing_loss=flat,
        router_z_loss=flat,
        lookups=zero,
        hits=zero,
        demand_fetches=zero,
        prefetches=zero,
        prefetches_wasted=zero,
        waves=zero,
    )
