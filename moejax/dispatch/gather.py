"""All-gather dispatch: every rank sees the tokens of its group and serves its own experts.

    all-gather tokens and choices ─► local experts ─► weighted sum ─► reduce-scatter

Two collectives of static shape, no capacity, nothing dropped; the default where a fast all-gather
beats a ragged all-to-all, as between GPUs of one node. There the switch can do the work of both:
`multicast`, two kernels for Hopper and later (`moejax.collectives.multicast`).

Axis letters:
    T  tokens of this rank    R  ranks on the axis    K  experts per token    D  model dim
"""

from functools import partial
from typing import Any, Literal, get_args

import jax

from moejax.collectives.multicast import multicast_all_gather, multicast_reduce_scatter
from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.dispatch.ranks import (
    Axis,
    axis_names,
    combined,
    experts_per_rank,
    own_choices,
    total_counts,
    without_logits,
)
from moejax.experts.stage import Stage, StageCounts, resident

Lowering = Literal["native", "multicast"]
LOWERINGS: tuple[str, ...] = get_args(Lowering)


def gather(
    inner: Stage = resident,
    *,
    num_experts: int,
    axis: Axis = "expert",
    token_axes: tuple[str, ...] = ("expert",),
    lowering: Lowering = "native",
) -> Stage:
    """The stage that runs `inner` on the tokens of all ranks of the mesh axis `axis`.

    For use inside `shard_map` with tokens and experts sharded over `axis`. `inner` sees all R * T
    tokens with rank-local expert ids, `num_experts / R` of them. Returns combined rows [T, D],
    because partial sums cost K times less on the wire than outputs kept apart; the order of
    summation differs from one device's. Counts are summed over `token_axes`, all mesh axes that
    tokens are sharded over. With `lowering="multicast"` rows travel by the switch between GPUs.
    Cost: an all-gather of R * T * (D + 2 K) words and a reduce-scatter of R * T * D float32.
    """
    check(lowering in LOWERINGS, f"lowering={lowering!r} is not one of {LOWERINGS}")

    def stage(
        x: jax.Array, routing: Routing, weights: Any, layer: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, StageCounts]:
        num_local = experts_per_rank(num_experts, axis, weights)
        run = partial(
            run_gathered,
            inner,
            num_local=num_local,
            width=min(routing.topk_idx.shape[1], num_local),
            axis=axis,
            token_axes=token_axes,
            lowering=lowering,
        )
        return run(x, routing, weights, layer, state)

    return stage


def run_gathered(
    inner: Stage,
    x: jax.Array,
    routing: Routing,
    weights: Any,
    layer: jax.Array,
    state: Any,
    *,
    num_local: int,
    width: int,
    axis: Axis,
    token_axes: tuple[str, ...],
    lowering: Lowering = "native",
) -> tuple[jax.Array, Any, StageCounts]:
    """`inner` on the tokens of all ranks, with the `width` first choices that this rank serves.

    What a token chose beyond `width` of the `num_local` experts here is dropped and counted.
    """
    with jax.named_scope("moe_dispatch"):
        native = partial(jax.lax.all_gather, axis_name=axis, tiled=True)
        by_switch = lowering == "multicast"
        x = multicast_all_gather(x, axis_names(axis)) if by_switch else native(x)
        routing = jax.tree.map(native, without_logits(routing))
        local, lost = own_choices(routing, axis, num_local, width=width)
    outputs, state, counts = inner(x, local, weights, layer, state)
    with jax.named_scope("moe_combine"):
        y = combined(outputs, local.topk_weights)
        if by_switch:
            y = multicast_reduce_scatter(y, axis_names(axis))
        else:
            y = jax.lax.psum_scatter(y, axis, scatter_dimension=0, tiled=True)
    return y.astype(x.dtype), state, total_counts(counts, token_axes, dropped=lost)
