"""Which layer to average in which step: DreamDDP's planner (arXiv 2502.11058).

Layers come in the order of the backward pass, the output's first. In a step, layers are sent one
after the other, each when its own backward pass is done; what is not sent by the end of the
backward pass is waited for. Each layer is sent once in H steps, in order, so that the waits of all
steps are least. Then layers whose transfer fits into the time before a step's first are sent an
extra time for nothing.

The published search walks on while layers are hidden, then branches: send one more and wait, or
leave it to the next step. Here it is memoised, and so takes L * H visits.

Letters:
    L  layers    H  steps of a period
"""

import dataclasses
import functools
from collections.abc import Sequence

from moejax.core.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class DreamPlan:
    """Steps of the period in which each layer is sent, and the seconds waited per period."""

    when: tuple[tuple[int, ...], ...]
    waited_s: float


def plan_layers(backward_s: Sequence[float], transfer_s: Sequence[float], period: int) -> DreamPlan:
    """The plan with the least waiting.

    Args:
        backward_s, transfer_s: seconds of each layer, the output's first.

    >>> plan_layers([1.0, 1.0, 1.0], [2.0, 1.0, 1.0], period=2)
    DreamPlan(when=((0,), (1,), (1,)), waited_s=1.0)
    """
    layers = len(backward_s)
    check(layers == len(transfer_s), f"{layers} backward times, {len(transfer_s)} transfer times")
    check(layers >= 1 and period >= 1, f"layers={layers} and period={period} must be at least 1")
    negative = min(*backward_s, *transfer_s) < 0
    check(not negative, "backward and transfer times must not be negative")

    @functools.cache
    def search(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Least waiting for layers from `first` on in `left` steps, and where each step ends."""
        if first == layers:
            return 0.0, (layers,) * left
        if left == 1:
            return waiting(backward_s, transfer_s, range(first, layers)), (layers,)
        hidden = first
        while hidden < layers and not waiting(backward_s, transfer_s, range(first, hidden + 1)):
            hidden += 1
        options = []
        for end in {hidden, min(hidden + 1, layers)}:
            rest, ends = search(end, left - 1)
            options.append(
                (waiting(backward_s, transfer_s, range(first, end)) + rest, (end, *ends))
            )
        return min(options)

    waited, ends = search(0, period)
    sent = [range(a, b) for a, b in zip((0, *ends), ends, strict=False)]
    when: list[list[int]] = [[] for _ in range(layers)]
    for step, chosen in enumerate(sent):
        for layer in (*fill_in(backward_s, transfer_s, chosen), *chosen):
            when[layer].append(step)
    return DreamPlan(when=tuple(tuple(steps) for steps in when), waited_s=waited)


def waiting(backward_s: Sequence[float], transfer_s: Sequence[float], sent: Sequence[int]) -> float:
    """Seconds from the end of the backward pass to that of the last transfer."""
    finished = 0.0
    for layer in sent:
        finished = max(finished, sum(backward_s[: layer + 1])) + transfer_s[layer]
    return max(0.0, finished - sum(backward_s))


def fill_in(
    backward_s: Sequence[float], transfer_s: Sequence[float], sent: Sequence[int]
) -> tuple[int, ...]:
    """Layers nearer the output whose transfers end before the first of `sent` could begin."""
    first = sent[0] if len(sent) else len(backward_s)
    free_until = sum(backward_s[: first + 1])
    finished, extra = 0.0, []
    for layer in range(first):
        end = max(finished, sum(backward_s[: layer + 1])) + transfer_s[layer]
        if end <= free_until:
            finished = end
            extra.append(layer)
    return tuple(extra)
