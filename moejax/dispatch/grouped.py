"""Dispatch of grouped experts: every token takes equally many experts on every rank.

    all-gather tokens and choices ─► K / R local experts each ─► weighted sum ─► reduce-scatter

MoGE (Pangu Pro, arXiv 2505.21411) chooses the top K / G inside each of G groups of experts. With
whole groups on each of R ranks every token visits every rank, so the all-to-all is an all-gather,
and every rank serves exactly T_all * K / R assignments: static shapes without slack or padding.

Axis letters:
    T  tokens of this rank    K  experts per token    R  ranks on the axis    G  groups of experts
    E  experts    D  model dim
"""

from functools import partial
from typing import Any

import jax

from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.dispatch.gather import run_gathered
from moejax.dispatch.ranks import Axis, experts_per_rank
from moejax.experts.stage import Stage, StageCounts, resident


def grouped(
    inner: Stage = resident,
    *,
    num_experts: int,
    num_groups: int,
    axis: Axis = "expert",
    token_axes: tuple[str, ...] = ("expert",),
) -> Stage:
    """The stage that serves K / R assignments of every token on each of R ranks.

    For use inside `shard_map` with tokens and experts sharded over `axis`. `inner` sees all R * T
    tokens with K / R choices each: the rows of `gather` divided by R. Choices beyond K / R on a
    rank, which a gate that balances over `num_groups` never makes, are dropped and counted.
    Returns combined rows [T, D]. Raises `InputError` when K does not divide over the groups or
    the groups over the ranks. Cost: as `gather`.
    """
    check(
        num_groups >= 1 and num_experts % num_groups == 0,
        f"num_experts={num_experts} is not divisible by num_groups={num_groups}",
    )

    def stage(
        x: jax.Array, routing: Routing, weights: Any, layer: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, StageCounts]:
        ranks, top_k = jax.lax.axis_size(axis), routing.topk_idx.shape[1]
        num_local = experts_per_rank(num_experts, axis, weights)
        check_groups(num_groups, top_k, ranks)
        run = partial(
            run_gathered,
            inner,
            num_local=num_local,
            width=top_k // ranks,
            axis=axis,
            token_axes=token_axes,
        )
        return run(x, routing, weights, layer, state)

    return stage


def check_groups(num_groups: int, top_k: int, ranks: int) -> None:
    """Raises `InputError` unless K / G choices per group fill whole groups on every rank."""
    check(
        top_k % num_groups == 0,
        f"top_k={top_k} is not divisible by num_groups={num_groups}: a balanced gate takes equally "
        f"many experts of each group",
    )
    check(
        num_groups % ranks == 0,
        f"num_groups={num_groups} is not divisible by {ranks} ranks: groups would be split",
    )
