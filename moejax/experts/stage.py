"""The expert stage: routed tokens in, one output row per assignment out.

A stage is where an MoE layer meets its experts. `resident` holds all weights on the device;
`reference` is the oracle; `moejax.dispatch` wraps a stage over a mesh axis and `moejax.offload`
serves one from host memory. On one rank they keep outputs apart, [T, K, D], so that the combine
runs in the same order everywhere and exact paths agree to the bit; a dispatch that adds up partial
sums of many ranks returns combined rows [T, D].

Axis letters:
    T  tokens    K  experts per token    N  assignments, T * K    D  model dim    E  experts
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.structs import Routing
from moejax.experts import gated
from moejax.experts.shard import local_routing, sum_ranks
from moejax.kernels.grouped_ffn import GatedWeights, grouped_ffn
from moejax.kernels.permute import permute, sort_by_group, ungroup


@struct.dataclass(kw_only=True)
class StageCounts:
    """Transfers of one layer call, in whole experts, and drops (see `MoEMetrics`)."""

    lookups: jax.Array
    hits: jax.Array
    demand_fetches: jax.Array
    prefetches: jax.Array
    prefetches_wasted: jax.Array
    waves: jax.Array
    low_fetches: jax.Array = struct.field(default_factory=lambda: jnp.int32(0))
    host_computes: jax.Array = struct.field(default_factory=lambda: jnp.int32(0))
    assignments_dropped: jax.Array = struct.field(default_factory=lambda: jnp.int32(0))


class Stage(Protocol):
    """Runs the chosen experts of one layer.

    Args:
        x: [T, D] gate inputs.
        routing: with `topk_idx == E` for assignments that must yield a zero row.
        weights: this layer's experts on the device, or None when the stage brings its own.
        layer: int32 scalar, index among the MoE layers.
        state: the stage's own carry through the layers (None when it has none).

    Returns: outputs [T, K, D] or combined rows [T, D], in x's dtype; the new state; counts.
    """

    def __call__(
        self,
        x: jax.Array,
        routing: Routing,
        weights: GatedWeights | None,
        layer: jax.Array,
        state: Any,
    ) -> tuple[jax.Array, Any, StageCounts]: ...


def resident_counts(group_sizes: jax.Array) -> StageCounts:
    """Counts of a layer whose experts are all on the device: every lookup hits."""
    wanted, zero = jnp.sum(group_sizes > 0, dtype=jnp.int32), jnp.int32(0)
    return StageCounts(
        lookups=wanted,
        hits=wanted,
        demand_fetches=zero,
        prefetches=zero,
        prefetches_wasted=zero,
        waves=jnp.int32(1),
    )


def resident_by(ffn: Callable[[jax.Array, GatedWeights, jax.Array], jax.Array]) -> Stage:
    """All experts on this device: sort rows by expert, run `ffn`, sort back. Dropless.

    `ffn` takes rows [N, D] sorted by expert, the weights, and int32 [E] rows per expert.
    """

    def stage(
        x: jax.Array,
        routing: Routing,
        weights: GatedWeights | None,
        layer: jax.Array,
        state: Any,
    ) -> tuple[jax.Array, Any, StageCounts]:
        assert weights is not None, "the resident stage wants the layer's experts"
        del layer
        num_experts = weights.w_gate.shape[0]
        with jax.named_scope("moe_permute"):
            permutation = sort_by_group(routing.topk_idx, num_experts)
            rows = permute(x, permutation, routing.topk_idx.shape[1])
        with jax.named_scope("moe_experts"):
            outputs = ffn(rows, weights, permutation.group_sizes)
        with jax.named_scope("moe_unpermute"):
            y = ungroup(outputs, permutation, routing.topk_idx.shape[1])
        return y, state, resident_counts(permutation.group_sizes)

    return stage


resident = resident_by(grouped_ffn)


def stacked(experts: GatedWeights, *, axis: str | None = None) -> Stage:
    """The resident stage over all layers' experts at once, leaves [L, E, ...]. Forward only.

    A scan over layers would copy a layer's experts out of the stack before reading a few of them;
    here the kernel reads the chosen rows in place. `axis`: mesh axis that E is sharded over, when
    inside `shard_map`.
    """
    num_experts = experts.w_gate.shape[1]
    flat = jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), experts)

    def stage(x, routing, weights, layer, state):
        assert weights is None, "the stacked stage brings its own experts"
        routing = local_routing(routing, axis, num_experts)
        top_k = routing.topk_idx.shape[1]
        permutation = sort_by_group(routing.topk_idx, num_experts)
        group_rows = layer * num_experts + jnp.arange(num_experts, dtype=jnp.int32)
        rows = permute(x, permutation, top_k)
        outputs = grouped_ffn(rows, flat, permutation.group_sizes, group_rows=group_rows)
        y = ungroup(outputs, permutation, top_k)
        counts = sum_ranks(resident_counts(permutation.group_sizes), axis)
        return sum_ranks(y, axis), state, dataclasses.replace(counts, waves=jnp.int32(1))

    return stage


def reference(
    x: jax.Array,
    routing: Routing,
    weights: GatedWeights | None,
    layer: jax.Array,
    state: Any,
) -> tuple[jax.Array, Any, StageCounts]:
    """`resident`, obviously right: every expert on every token."""
    assert weights is not None, "the reference stage wants the layer's experts"
    del layer
    num_experts = weights.w_gate.shape[0]
    sizes = sort_by_group(routing.topk_idx, num_experts).group_sizes
    return gated.every_expert(weights, x, routing), state, resident_counts(sizes)
