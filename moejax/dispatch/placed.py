"""Any dispatch with experts wherever a placement says, several copies of some.

    logical choices ─► replica policy ─► slots ─► dispatch over P slots instead of E experts

The placement is data: another one runs through the same program and gives the same outputs. Copies
of an expert are trained as one (`tie`).

Axis letters:
    T  tokens of this rank    K  experts per token    E  experts    P  physical slots
    R  ranks on the axis    D  model dim
"""

import dataclasses
from typing import Any

import jax

from moejax.core.errors import check
from moejax.core.structs import ExpertPlacement, Routing, at_layer
from moejax.dispatch.ranks import Axis
from moejax.dispatch.replicas import Policy, round_robin
from moejax.dispatch.tie import tie_replicas
from moejax.experts.stage import Stage, StageCounts


def placed(
    stage: Stage,
    placement: ExpertPlacement,
    *,
    axis: Axis | None = "expert",
    policy: Policy = round_robin,
) -> Stage:
    """The stage that runs `stage`, made for `num_experts=P`, on the slots of a placement.

    Inside `shard_map` the weights are those of this rank's slots, [P / R, ...]. To compile once for
    all placements, make the stage where `placement` is an argument of the jitted function, passed
    to `shard_map` with the spec `P()`.

    Args:
        placement: of all layers, or with a leading [L] of each.
        axis: as that of `stage`, all its levels together for `hierarchical`; None on one device.
        policy: which copy serves an assignment, see `moejax.dispatch.replicas`.

    Counts are those of `stage`, where copies count as distinct experts. Raises `InputError` when P
    does not divide over the ranks, or differs from the number of slots in the weights. Cost: the
    policy's; backward, an all-reduce of P - E experts.
    """

    def run(
        x: jax.Array, routing: Routing, weights: Any, layer: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, StageCounts]:
        ranks = 1 if axis is None else jax.lax.axis_size(axis)
        num_slots = placement.num_slots
        check(num_slots % ranks == 0, f"{num_slots} slots are not divisible by {ranks} ranks")
        for leaf in jax.tree.leaves(weights):
            check(
                leaf.shape[0] * ranks == num_slots,
                f"the placement has {num_slots} slots, the weights {leaf.shape[0]} on each of "
                f"{ranks} ranks",
            )
        here = at_layer(placement, layer)
        with jax.named_scope("moe_place"):
            slots = policy(routing.topk_idx, here, ranks=ranks, axis=axis)
            tied = tie_replicas(axis, here, weights)
        return stage(x, dataclasses.replace(routing, topk_idx=slots), tied, layer, state)

    return run
