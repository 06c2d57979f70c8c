"""One budget: total device bytes, solved to a number of slots.

`--device_budget` counts everything that lives on the device: dense weights, KV cache, workspace,
predictor, landing buffers, slots. A percentage means experts only: with `25%` a quarter of the
experts fits on the device, in slots and landing buffers together.
"""

import dataclasses
import math
import re

from moejax.core.errors import InputError, check

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a model wants on the device, in bytes, besides slots (all per rank)."""

    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int
    expert_bytes: int  # one expert, all parts
    num_layers: int
    num_experts: int  # of this rank
    landing_experts: int = 1  # in flight: prefetch lanes and the wave buffer
    predictor_bytes: int = 0  # weights of a learned one

    @property
    def fixed_bytes(self) -> int:
        landing = self.landing_experts * self.expert_bytes
        return (
            self.dense_bytes + self.kv_bytes + self.workspace_bytes + self.predictor_bytes + landing
        )

    @property
    def total_experts(self) -> int:
        return self.num_layers * self.num_experts


def parse_budget(text: str) -> float | int | None:
    """`8GiB` -> bytes, `25%` -> the fraction 0.25 (a float), `none` -> None.

    >>> parse_budget("1.5MiB"), parse_budget("25%"), parse_budget("none")
    (1572864, 0.25, None)
    """
    word = text.strip()
    if word.lower() == "none":
        return None
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*|%)", word)
    if match and match[2] == "%":
        percent = float(match[1])
        check(0 < percent <= 100, f"device budget {text!r} must be above 0% and at most 100%")
        return percent / 100
    if not match or match[2].upper() not in _UNITS:
        raise InputError(f"device budget {text!r} is not like 8GiB, 512MiB, 25% or none")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def solve_slots(budget: float | int | None, footprint: Footprint, *, min_slots: int) -> int:
    """Slots that fit the budget, at most one for every expert.

    Args:
        budget: as `parse_budget` returns it.
        min_slots: what the cache needs to run at all: one per layer with layer quotas, else one.

    Raises `InputError` that says the smallest budget when it does not suffice.
    """
    total = footprint.total_experts
    if budget is None:
        return total
    if isinstance(budget, float):
        landing = footprint.landing_experts
        slots = math.floor(budget * total + 1e-9) - landing
        least = f"{math.ceil(1000 * (min_slots + landing) / total) / 10:g}%"
        check(
            slots >= min_slots,
            f"device budget {100 * budget:g}% of {total} experts leaves {slots} slots beside "
            f"{landing} landing experts; the minimum is {min_slots} slots, a budget of {least}",
        )
        return slots
    free = budget - footprint.fixed_bytes
    slots = min(total, free // footprint.expert_bytes) if free > 0 else 0
    least_bytes = footprint.fixed_bytes + min_slots * footprint.expert_bytes
    check(
        slots >= min_slots,
        f"device budget {budget} bytes is too small; the minimum is {least_bytes} bytes "
        f"(dense {footprint.dense_bytes}, KV {footprint.kv_bytes}, workspace "
        f"{footprint.workspace_bytes}, predictor {footprint.predictor_bytes}, "
        f"{footprint.landing_experts} landing and {min_slots} slot "
        f"experts of {footprint.expert_bytes})",
    )
    return slots
