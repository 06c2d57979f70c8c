"""Structs that travel between packages. Leaves may be arrays, specs or ShapeDtypeStructs.

Axis letters:
    T  tokens on this shard      K  experts per token      E  experts      L  MoE layers
    P  physical slots, each holding one copy of an expert
"""

import jax
import jax.numpy as jnp
import numpy as np
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
class ExpertPlacement:
    """Where experts live: P slots over the ranks of a mesh axis, several of which may hold one.

    Slots are counted rank by rank, `P / ranks` on each, so slot p lies on rank `p // (P / ranks)`.
    Arrays, not constants: moving an expert recompiles nothing. Leaves have a leading [L] where
    layers differ. Made, and checked, by `moejax.placement.build`.
    """

    phys_to_log: jax.Array | np.ndarray  # int32 [P], the expert in each slot
    log_to_phys: jax.Array | np.ndarray  # int32 [E, Rmax], its slots, ascending, then -1
    num_replicas: jax.Array | np.ndarray  # int32 [E], at least 1

    @property
    def num_slots(self) -> int:
        """P."""
        return self.phys_to_log.shape[-1]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.num_replicas.shape[-1]


def at_layer(placement: ExpertPlacement, layer: jax.Array | int) -> ExpertPlacement:
    """The placement of one MoE layer; the placement itself where all layers share one."""
    placement = jax.tree.map(jnp.asarray, placement)
    if placement.phys_to_log.ndim == 1:
        return placement
    return jax.tree.map(lambda leaf: leaf[layer], placement)


@struct.dataclass(kw_only=True)
class MoEMetrics:
    """What one MoE layer did; stacked to a leading [L] by the scan over layers.

    Lookups and transfers are summed over ranks and counted in whole experts; for bytes see
    `offload.source.moved_bytes`. Transfers are zero on a resident layer.
    """

    expert_load: jax.Array  # int32 [E], assignments per expert
    assignments_dropped: jax.Array  # int32 []
    load_balancing_loss: jax.Array  # float32 [], 1.0 when balanced
    router_z_loss: jax.Array  # float32 []
    lookups: jax.Array  # int32 [], distinct experts wanted
    hits: jax.Array  # int32 [], wanted experts that the device had
    demand_fetches: jax.Array  # int32 [], experts fetched because they were missing
    low_fetches: jax.Array  # int32 [], of those, the ones fetched in few bits (lossy)
    host_computes: jax.Array  # int32 [], missing experts that the host computed instead
    prefetches: jax.Array  # int32 [], experts fetched for this layer ahead of time
    prefetches_wasted: jax.Array  # int32 [], of those, neither wanted by this layer nor kept
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
        low_fetches=zero,
        host_computes=zero,
        prefetches=zero,
        prefetches_wasted=zero,
        waves=zero,
    )
