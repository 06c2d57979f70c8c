"""How many levels a hierarchical dispatch should have: HierMoE's model (arXiv 2508.09591, IV-A).

A token is sent once per destination group at each level, so level i moves as many rows as there are
pairs of a token and one of U_i groups that holds one of its experts. d levels over mesh axes
(a, b, c), outermost first: the first d - 1 axes one by one, then all others together.

Axis letters:
    T  tokens of a rank    E  experts    K  experts per token    U  groups at a level
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from moejax.core.errors import check
from moejax.costmodel.links import Link

Level = tuple[str, ...]  # mesh axes


def touched_share(num_experts: int, top_k: int, groups: int) -> float:
    """Probability that a token with K uniform distinct experts wants one of a group's E / U."""
    check(
        num_experts % groups == 0, f"num_experts={num_experts} is not divisible by {groups} groups"
    )
    rest = num_experts - num_experts // groups
    return 1.0 - math.comb(rest, top_k) / math.comb(num_experts, top_k)


def duplication_rate(num_experts: int, top_k: int, groups: int) -> float:
    """Share of K sends per token that a send per group saves (HierMoE, Table II)."""
    return 1.0 - groups * touched_share(num_experts, top_k, groups) / top_k


def incidences(topk_idx: np.ndarray, num_experts: int, groups: int) -> np.ndarray:
    """int64 [U]: tokens of `topk_idx` [T, K] that want each group; padding (id E) wants none."""
    check(
        num_experts % groups == 0, f"num_experts={num_experts} is not divisible by {groups} groups"
    )
    group = topk_idx // (num_experts // groups)
    return np.array([(group == g).any(1).sum() for g in range(groups)], np.int64)


def candidate_levels(axes: Sequence[str]) -> tuple[tuple[Level, ...], ...]:
    """The levels of d = 1 ... len(axes)."""
    axes = tuple(axes)
    check(len(axes) >= 1, "a hierarchy wants one mesh axis at least")
    return tuple(
        tuple((axis,) for axis in axes[: d - 1]) + (axes[d - 1 :],) for d in range(1, len(axes) + 1)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The fastest levels, and what the model says about all candidates."""

    levels: tuple[Level, ...]
    seconds: dict[tuple[Level, ...], float]  # of one dispatch, per candidate

    def explain(self) -> str:
        """One line for people: every candidate and its predicted time."""
        names = {levels: " > ".join("+".join(level) for level in levels) for levels in self.seconds}
        parts = (f"{names[levels]}: {1e3 * s:.3f} ms" for levels, s in self.seconds.items())
        return f"levels {names[self.levels]} of " + ", ".join(parts)


def level_rows(
    levels: Sequence[Level],
    sizes: Mapping[str, int],
    *,
    tokens: int,
    shares: Mapping[int, float],
) -> list[float]:
    """Rows that one rank sends at each level, its own group included.

    `shares` gives for U groups the largest share of all tokens that want one of them: measured
    (`incidences(...).max() / T`), or `touched_share` for uniform routing.
    """
    rows, groups = [], 1
    for level in levels:
        outer, size = groups, math.prod(sizes[axis] for axis in level)
        groups *= size
        # A rank holds the tokens of `outer` ranks that wanted its group.
        rows.append(size * outer * tokens * shares[groups])
    return rows


def choose_levels(
    sizes: Mapping[str, int],
    links: Mapping[Level, Link],
    *,
    tokens: int,
    row_bytes: int,
    shares: Mapping[int, float],
) -> Choice:
    """The levels with the least t_d (HierMoE, eq. 3 to 6), by trying all.

    Args:
        sizes: mesh axes that experts are sharded over, outermost (slowest) first.
        links: what an all-to-all costs over each level of each candidate.
        tokens: of one rank.
        shares: see `level_rows`.
    """
    seconds = {}
    for levels in candidate_levels(tuple(sizes)):
        rows = level_rows(levels, sizes, tokens=tokens, shares=shares)
        for level in levels:
            check(level in links, f"no link over {'+'.join(level)} among {len(links)} links")
        seconds[levels] = sum(
            links[level].seconds(count * row_bytes)
            for level, count in zip(levels, rows, strict=True)
        )
    return Choice(levels=min(seconds, key=lambda levels: seconds[levels]), seconds=seconds)
