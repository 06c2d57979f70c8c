"""Shares of a payload over several rails, so that all finish together: Nezha (arXiv 2405.17870).

Rail r takes a_r + s_r L / b_r seconds for its share s_r of L bytes. The paper's text gives the
mechanism, cost feedback and rails that are cold for small payloads, not the formula; this is ours.
With rails in the order of their start-up a_r, the first m of them finish together at

    T_m = (L + sum_{r<=m} a_r b_r) / sum_{r<=m} b_r,    s_r = b_r (T_m - a_r) / L,

and rail m + 1 is worth starting (hot) where T_m > a_{m+1}: for two rails from b_1 (a_2 - a_1) on.

Programs are compiled for their shares, so shares are whole sixteenths: few programs serve all.
"""

import dataclasses
import math
from collections.abc import Sequence

from moejax.core.errors import check
from moejax.costmodel.links import Link

PARTS = 16
Shares = tuple[int, ...]  # sixteenths of the payload, one per rail


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The best split of a payload into any shares."""

    shares: tuple[float, ...]  # one per rail, 0 for a cold one
    seconds: float


def best_split(links: Sequence[Link], nbytes: float) -> Split:
    """The shares with which the last rail finishes first.

    >>> fast = Link(alpha_s=0.0, beta_s_per_byte=1e-9)
    >>> slow = Link(alpha_s=0.0, beta_s_per_byte=3e-9)
    >>> best_split([fast, slow], 4e9).shares
    (0.75, 0.25)
    """
    order = _by_startup(links)
    check(nbytes > 0, f"nbytes={nbytes} must be positive")
    rate = load = 0.0
    finish, hot = math.inf, []
    for rail in order:
        if finish <= links[rail].alpha_s:
            break
        speed = 1 / links[rail].beta_s_per_byte
        rate, load = rate + speed, load + links[rail].alpha_s * speed
        finish, hot = (nbytes + load) / rate, [*hot, rail]
    shares = [0.0] * len(links)
    for rail in hot:
        link = links[rail]
        shares[rail] = (finish - link.alpha_s) / link.beta_s_per_byte / nbytes
    return Split(shares=tuple(shares), seconds=finish)


def hot_from(links: Sequence[Link]) -> tuple[float, ...]:
    """Bytes from which each rail takes part, 0 for the first.

    >>> near = Link(alpha_s=5e-6, beta_s_per_byte=1e-10)
    >>> far = Link(alpha_s=50e-6, beta_s_per_byte=1e-9)
    >>> [round(n) for n in hot_from([near, far])]
    [0, 450000]
    """
    order, bytes_from = _by_startup(links), [0.0] * len(links)
    for m in range(1, len(order)):
        start = links[order[m]].alpha_s
        before = (links[rail] for rail in order[:m])
        bytes_from[order[m]] = sum((start - one.alpha_s) / one.beta_s_per_byte for one in before)
    return tuple(bytes_from)


def best_sixteenths(links: Sequence[Link | None], nbytes: float) -> Shares:
    """The whole sixteenths with which the last rail finishes first; none for rails that are None.

    Each sixteenth goes where it finishes first, which is optimal: rails do not share anything.
    """
    alive = [rail for rail, link in enumerate(links) if link is not None]
    check(len(alive) > 0, f"all {len(links)} rails have failed")
    check(nbytes > 0, f"nbytes={nbytes} must be positive")
    shares = [0] * len(links)
    for _ in range(PARTS):

        def after(rail: int) -> float:
            link = links[rail]
            assert link is not None
            return link.seconds(nbytes * (shares[rail] + 1) / PARTS)

        shares[min(alive, key=after)] += 1
    return tuple(shares)


def seconds_of(links: Sequence[Link], shares: Shares, nbytes: float) -> float:
    """Until the last rail with a share has finished."""
    check(sum(shares) == PARTS, f"shares={shares} are {sum(shares)} sixteenths")
    return max(
        link.seconds(nbytes * share / PARTS)
        for link, share in zip(links, shares, strict=True)
        if share
    )


def _by_startup(links: Sequence[Link]) -> list[int]:
    check(len(links) > 0, "a split wants at least one rail")
    for rail, link in enumerate(links):
        check(link.beta_s_per_byte > 0, f"rail {rail} has beta={link.beta_s_per_byte}, above 0")
    return sorted(range(len(links)), key=lambda rail: links[rail].alpha_s)
