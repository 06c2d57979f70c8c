"""Placements from numpy arrays, checked; all leaves int32.

Whatever the experts in the slots are, the arrays of equally many slots have equal shapes: a step
that was compiled for one placement runs with every other.

Axis letters:
    P  physical slots    E  experts    L  MoE layers
"""

from typing import Any

import numpy as np

from moejax.core.errors import check
from moejax.core.structs import ExpertPlacement


def identity(num_experts: int) -> ExpertPlacement:
    """Every expert once, in order: what the experts of a checkpoint look like."""
    return from_phys_to_log(np.arange(num_experts), num_experts=num_experts, ranks=1)


def from_phys_to_log(
    phys_to_log: Any,
    *,
    num_experts: int,
    ranks: int,
    twice_on_rank: bool = False,
) -> ExpertPlacement:
    """The placement with expert `phys_to_log[p]` in slot p; [P], or [L, P] for one per layer.

    >>> from_phys_to_log([0, 1, 0, 2], num_experts=3, ranks=2).log_to_phys.tolist()
    [[0, 2], [1, -1], [3, -1]]

    Args:
        ranks: of the mesh axis that slots are spread over.
        twice_on_rank: allows several copies of an expert on one rank. They serve no purpose but
            to fill slots, and EPLB's packing sometimes makes them.

    Raises `InputError` when slots do not divide over the ranks, and for ids out of range, experts
    without a slot, and experts that are twice on a rank.
    """
    slots = np.asarray(phys_to_log)
    check(
        slots.ndim in (1, 2) and slots.size > 0,
        f"phys_to_log has shape {slots.shape}, expected [P] or [L, P]",
    )
    check(np.issubdtype(slots.dtype, np.integer), f"phys_to_log is {slots.dtype}, not integers")
    slots = slots.astype(np.int32)
    num_slots = slots.shape[-1]
    check(
        ranks >= 1 and num_slots % ranks == 0 and num_slots > 0,
        f"{num_slots} slots are not divisible by {ranks} ranks",
    )
    rows = [
        _one_layer(row, num_experts, ranks, twice_on_rank, f"layer {layer}: " * (slots.ndim == 2))
        for layer, row in enumerate(slots.reshape(-1, num_slots))
    ]
    log_to_phys, num_replicas = (np.stack(leaf) for leaf in zip(*rows, strict=True))
    lead = slots.shape[:-1]
    return ExpertPlacement(
        phys_to_log=slots,
        log_to_phys=log_to_phys.reshape(*lead, *log_to_phys.shape[1:]),
        num_replicas=num_replicas.reshape(*lead, num_experts),
    )


def max_replicas(num_slots: int, num_experts: int) -> int:
    """The most copies that an expert can have: all slots that the others leave over."""
    return num_slots - num_experts + 1


def swapped(placement: ExpertPlacement, layers: Any, a: Any, b: Any) -> ExpertPlacement:
    """The placement after slots `a[i]` and `b[i]` of layer `layers[i]` changed contents, in order.

    `layers` is ignored where all layers share one placement.
    """
    slots = np.array(placement.phys_to_log)
    pairs = np.broadcast_arrays(*map(np.atleast_1d, (layers, a, b)))
    for layer, one, other in zip(*pairs, strict=True):
        row = slots if slots.ndim == 1 else slots[layer]
        row[[one, other]] = row[[other, one]]
    return from_phys_to_log(slots, num_experts=placement.num_experts, ranks=1, twice_on_rank=True)


def _one_layer(
    row: np.ndarray, num_experts: int, ranks: int, twice_on_rank: bool, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """`log_to_phys` and `num_replicas` of one layer's slots [P]."""
    wrong = row[(row < 0) | (row >= num_experts)]
    check(
        wrong.size == 0,
        f"{where}slots hold experts {np.unique(wrong)[:4].tolist()}, num_experts={num_experts}",
    )
    count = np.bincount(row, minlength=num_experts).astype(np.int32)
    missing = np.flatnonzero(count == 0)
    check(
        missing.size == 0,
        f"{where}{len(row)} slots hold no copy of {missing.size} of {num_experts} experts, "
        f"the first is {missing[:1].tolist()}",
    )
    if not twice_on_rank:
        for rank, held in enumerate(row.reshape(ranks, -1)):
            ids, copies = np.unique(held, return_counts=True)
            check(
                bool((copies == 1).all()),
                f"{where}rank {rank} holds {copies.max()} copies of expert {ids[copies.argmax()]}",
            )
    table = np.full((num_experts, max_replicas(len(row), num_experts)), -1, np.int32)
    order = np.argsort(row, kind="stable")
    column = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    table[row[order], column] = order
    return table, count
