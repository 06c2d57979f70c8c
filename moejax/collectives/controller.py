"""Shares that follow what the rails do: measured costs in, whole sixteenths out.

The controller of Nezha (arXiv 2405.17870) in pure functions over a frozen state. It believes a
start-up per rail and estimates its rate by a moving average. It changes shares only where that is
worth a program of its own: for a gain in time that lasts, or when a rail fails.
"""

import dataclasses
import math
from collections.abc import Sequence

from moejax.collectives.rails import PARTS, Shares, best_sixteenths, seconds_of
from moejax.core.errors import check
from moejax.costmodel.links import Link


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """How fast to believe, and when to act.

    Attributes:
        memory: weight of the past in a rail's moving average.
        hysteresis: share of the step's seconds that other shares must save.
        patience: steps in which a change must look worth it before it is made.
    """

    memory: float = 0.7
    hysteresis: float = 0.08
    patience: int = 5

    def __post_init__(self):
        for name in ("memory", "hysteresis"):
            value = getattr(self, name)
            check(0 <= value < 1, f"{name}={value} must be in [0, 1)")
        check(self.patience >= 1, f"patience={self.patience} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerState:
    """What is believed of each rail, and the shares in use."""

    links: tuple[Link, ...]
    failed: tuple[bool, ...]
    shares: Shares
    waited: int = 0  # steps in which other shares looked better

    @property
    def alive(self) -> tuple[Link | None, ...]:
        return tuple(
            None if failed else link for link, failed in zip(self.links, self.failed, strict=True)
        )


def start(links: Sequence[Link], nbytes: float) -> ControllerState:
    """Shares by what is believed before the first step."""
    return ControllerState(
        links=tuple(links),
        failed=(False,) * len(links),
        shares=best_sixteenths(links, nbytes),
    )


def observe(
    state: ControllerState, seconds: Sequence[float], nbytes: float, cfg: ControllerConfig
) -> ControllerState:
    """The state after a step in which each rail took so long; `inf` for one that did not finish.

    A rail without a share says nothing of itself, whatever its entry. Raises `InputError` when the
    last rail fails.
    """
    check(len(seconds) == len(state.links), f"{len(seconds)} times of {len(state.links)} rails")
    links, failed = list(state.links), list(state.failed)
    for rail, (took, share) in enumerate(zip(seconds, state.shares, strict=True)):
        if not share:
            continue
        if math.isinf(took):
            failed[rail] = True
            continue
        links[rail] = _believe(links[rail], took, nbytes * share / PARTS, cfg.memory)
    seen = dataclasses.replace(state, links=tuple(links), failed=tuple(failed))
    wanted = best_sixteenths(seen.alive, nbytes)
    lost = any(share for share, gone in zip(state.shares, failed, strict=True) if gone)
    if lost:
        return dataclasses.replace(seen, shares=wanted, waited=0)
    now, then = (seconds_of(seen.links, shares, nbytes) for shares in (state.shares, wanted))
    if then >= (1 - cfg.hysteresis) * now:
        return dataclasses.replace(seen, waited=0)
    if state.waited + 1 < cfg.patience:
        return dataclasses.replace(seen, waited=state.waited + 1)
    return dataclasses.replace(seen, shares=wanted, waited=0)


def revive(state: ControllerState, rail: int, link: Link, nbytes: float) -> ControllerState:
    """The state with a rail back, believed to be `link`."""
    check(0 <= rail < len(state.links), f"rail={rail} is not in 0..{len(state.links) - 1}")
    links = (*state.links[:rail], link, *state.links[rail + 1 :])
    failed = (*state.failed[:rail], False, *state.failed[rail + 1 :])
    back = dataclasses.replace(state, links=links, failed=failed, waited=0)
    return dataclasses.replace(back, shares=best_sixteenths(back.alive, nbytes))


def _believe(link: Link, took: float, nbytes: float, memory: float) -> Link:
    """The link with its rate moved towards what this transfer shows of it."""
    seen = max(took - link.alpha_s, 1e-12) / nbytes
    # Rates, not their inverses: one slow step must not count for more than one fast step.
    rate = memory / link.beta_s_per_byte + (1 - memory) / seen
    return dataclasses.replace(link, beta_s_per_byte=1 / rate)
