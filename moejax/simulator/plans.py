"""Ways to run an offloaded step: the fixed ones that others use, and what a planner may choose."""

import dataclasses
import itertools
from typing import Literal

from moejax.core.errors import check

Serve = Literal["fetch", "host", "whole", "columns"]
Keep = Literal["none", "static", "lru", "lfu", "average"]
Prefetch = Literal["none", "gate", "layer", "slack"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do with misses, with the cache and with an idle link."""

    name: str
    serve: Serve  # misses: all moved, all on the host, divided as whole experts, one split
    keep: Keep = "none"  # static: the past's most used; average: of a moving average of uses
    # gate: the predicted experts, and the layer waits for them. layer: all of the next layer's.
    # slack: predicted ones as long as no miss waits.
    prefetch: Prefetch = "none"
    lanes: int | None = None  # most prefetches of a layer; None for all that are predicted
    parts: int = 1  # transfers of an expert; a started one is not interrupted
    admission: bool = False  # an idle link swaps experts by moving average
    quotas: bool = False  # slots per layer by dynamic programming instead of equal ones
    wire: float = 1.0  # bytes on the link over bytes stored; below 1 is lossy


FIXED: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan(name="on_demand", serve="fetch"),
        Plan(name="lru", serve="fetch", keep="lru"),
        Plan(name="lfu", serve="fetch", keep="lfu"),
        Plan(name="next_gate", serve="fetch", keep="lru", prefetch="gate"),
        Plan(name="whole_layer", serve="fetch", keep="lru", prefetch="layer"),
        Plan(name="all_host", serve="host"),
        Plan(name="static_hot", serve="host", keep="static"),
        Plan(name="presched_blind", serve="whole", keep="lfu", parts=3),
        Plan(name="presched", serve="whole", keep="lfu", prefetch="slack", parts=3),
    )
}


def candidate_plans() -> list[Plan]:
    """What the planner compares: the fixed plans, and column splits in all variants."""
    static = Plan(name="columns+static", serve="columns", keep="static", parts=16)
    keeps: tuple[Keep, ...] = ("lfu", "average")
    ways: tuple[Prefetch, ...] = ("none", "slack")
    own = [
        dataclasses.replace(
            static,
            name=f"columns+{keep}{'+admission' if admission else ''}"
            f"{'+prediction' if prefetch == 'slack' else ''}",
            keep=keep,
            admission=admission,
            prefetch=prefetch,
        )
        for keep, admission, prefetch in itertools.product(keeps, (False, True), ways)
    ]
    quotas = [
        dataclasses.replace(plan, name=f"{plan.name}+quotas", quotas=True)
        for plan in own
        if not plan.admission and plan.prefetch == "slack"
    ]
    # Whole experts enter the cache, parts of them do not.
    whole = [
        dataclasses.replace(FIXED[of], name=name, admission=True)
        for of, name in (
            ("presched_blind", "whole+lfu+admission"),
            ("presched", "whole+lfu+admission+prediction"),
        )
    ]
    moved = [
        Plan(name="fetch+average", serve="fetch", keep="average", parts=16),
        Plan(
            name="fetch+average+prediction",
            serve="fetch",
            keep="average",
            prefetch="slack",
            parts=16,
        ),
    ]
    return [*FIXED.values(), static, *own, *quotas, *whole, *moved]


def ablation_plans() -> list[Plan]:
    """Five means, first added one after another, then left out of the whole one by one.

    Half the bytes on the wire are lossy, so `all` leaves that out; it is added alone.
    """
    base = Plan(name="on_demand", serve="fetch", parts=16)
    host = dataclasses.replace(base, name="+ host compute", serve="columns")
    cache = dataclasses.replace(host, name="+ cache", keep="lfu")
    admission = dataclasses.replace(cache, name="+ admission", admission=True)
    whole = dataclasses.replace(admission, name="+ prediction = all", prefetch="slack")
    return [
        base,
        host,
        cache,
        admission,
        whole,
        dataclasses.replace(whole, name="all + half the wire bytes (lossy)", wire=0.5),
        dataclasses.replace(whole, name="all - host compute", serve="fetch"),
        dataclasses.replace(whole, name="all - column split", serve="whole"),
        dataclasses.replace(whole, name="all - cache", keep="none", admission=False),
        dataclasses.replace(whole, name="all - admission", admission=False),
        dataclasses.replace(whole, name="all - prediction", prefetch="none"),
    ]


def slots_of_fraction(fraction: float, num_layers: int, num_experts: int) -> int:
    """Slots of a cache that holds `fraction` of all experts, at least one per layer."""
    slots = int(fraction * num_layers * num_experts + 1e-9)
    least = 100 / num_experts
    check(
        0 < fraction <= 1 and slots >= num_layers,
        f"a budget of {100 * fraction:g}% is {slots} slots for {num_layers} layers; the minimum is"
        f" one each, {least:.3g}%",
    )
    return slots
