"""Sync plans: which part of the weights is averaged over workers in which step, and how.

A worker is one coordinate of the synchronised mesh axes, with weights of its own. Its inner
optimizer proposes an update u of its weights p every step; a plan says what happens to them:

    base    = p + u, or p where the plan overlaps      (known before the step's own computation)
    sent    = base, or outer - base with an outer optimizer; with a codec what that makes of it
    target  = mean of sent, or outer' = the outer optimizer's step by it
    new p   = keep_local * base + (1 - keep_local) * target, plus u where the plan overlaps

An overlapping plan reduces what the last step left, inside the next step's program and beside its
forward and backward pass. One type thus holds

    local SGD         (arXiv 1805.09767)    everything every H steps
    DreamDDP          (arXiv 2502.11058)    each layer once in H steps, overlapped (`dream`)
    DiLoCo            (arXiv 2311.08105)    everything every H steps, Nesterov outside
    Streaming DiLoCo  (arXiv 2501.18512)    fragments in turn, overlapped, coded, mixed in
    CD-SGD            (arXiv 2106.10796)    everything every step, one late, two bits, every k exact

Letters:
    H  steps of a period    k  synchronisations from one exact one to the next
"""

import dataclasses
from collections.abc import Sequence

from moejax.collectives.codecs import BlockQuant, TwoBit
from moejax.collectives.schedule import Codec
from moejax.core.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    """Gradient descent on the mean movement of the workers, with Nesterov momentum."""

    learning_rate: float = 0.7
    momentum: float = 0.9

    def __post_init__(self):
        check(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive")
        check(0 <= self.momentum < 1, f"momentum={self.momentum} must be in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyncPlan:
    """When each fragment of the weights is synchronised, and how.

    Attributes:
        when: per fragment, the steps of the period in which it is.
        period: H.
        overlap: whether what is sent is what the step starts with.
        outer: None to average weights; costs one copy of them otherwise, two with momentum.
        keep_local: share of a worker's own weights that it keeps at a synchronisation.
        codec: of what is sent.
        feedback: whether what a codec left out is added to what is sent next; costs a copy of the
            weights.
        exact_every: k; the first of k synchronisations goes without codec.
    """

    when: tuple[tuple[int, ...], ...]
    period: int
    overlap: bool = False
    outer: Outer | None = None
    keep_local: float = 0.0
    codec: Codec | None = None
    feedback: bool = True
    exact_every: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "when", tuple(tuple(steps) for steps in self.when))
        check(self.period >= 1, f"period={self.period} must be at least 1")
        check(len(self.when) >= 1, "a plan wants at least one fragment")
        for fragment, steps in enumerate(self.when):
            inside = all(0 <= step < self.period for step in steps)
            once = len(set(steps)) == len(steps) > 0
            check(
                inside and once,
                f"fragment {fragment} is synchronised in steps {steps}, which must be different "
                f"ones of 0..{self.period - 1}, at least one",
            )
        check(0 <= self.keep_local < 1, f"keep_local={self.keep_local} must be in [0, 1)")
        coded = self.codec is not None
        check(
            not coded or self.outer is not None,
            "a codec wants an outer optimizer: weights are no differences",
        )
        check(
            self.exact_every is None or (coded and self.exact_every >= 1),
            f"exact_every={self.exact_every} wants a codec and at least 1",
        )

    @property
    def num_fragments(self) -> int:
        return len(self.when)

    def due(self, step: int) -> tuple[int, ...]:
        """Fragments that are synchronised in a step of the period."""
        return tuple(f for f, steps in enumerate(self.when) if step in steps)


def local_sgd(period: int) -> SyncPlan:
    """Weights averaged every `period` steps."""
    return SyncPlan(when=((period - 1,),), period=period)


def diloco(period: int, outer: Outer = Outer(), codec: Codec | None = None) -> SyncPlan:  # noqa: B008
    """An outer step by Nesterov momentum every `period` steps."""
    return SyncPlan(when=((period - 1,),), period=period, outer=outer, codec=codec)


def streaming_diloco(
    period: int,
    num_fragments: int,
    outer: Outer = Outer(),  # noqa: B008
    codec: Codec | None = BlockQuant(4, 32),  # noqa: B008
    keep_local: float = 0.5,
) -> SyncPlan:
    """Fragments in turn, evenly over the period, in four bits, overlapped, half mixed in."""
    check(
        1 <= num_fragments <= period,
        f"num_fragments={num_fragments} must be between 1 and period={period}",
    )
    turns = ((f * period // num_fragments,) for f in range(num_fragments))
    return SyncPlan(
        when=tuple(turns),
        period=period,
        overlap=True,
        outer=outer,
        codec=codec,
        keep_local=keep_local,
    )


def cd_sgd(threshold: float, exact_every: int) -> SyncPlan:
    """Updates in two bits, one step late; every `exact_every`-th in full."""
    return SyncPlan(
        when=((0,),),
        period=1,
        overlap=True,
        outer=Outer(learning_rate=1.0, momentum=0.0),
        codec=TwoBit(threshold),
        exact_every=exact_every,
    )


def partial_local_sgd(when: Sequence[Sequence[int]], period: int) -> SyncPlan:
    """Weights of each fragment averaged in its own steps, overlapped: what DreamDDP runs."""
    return SyncPlan(when=tuple(map(tuple, when)), period=period, overlap=True)
