"""EPLB, DeepSeek's balancer: replicate loaded experts, pack them evenly (arXiv 2412.19437, 3.4.1).

    groups of experts ─► nodes     experts of a node ─► replicas ─► ranks of the node

Both steps are greedy. Groups of experts stay on one node, so a router that limits a token to a few
groups limits its traffic between nodes too. With one group and one node it is the global policy.

Axis letters:
    E  experts    P  physical slots    L  MoE layers    n  items to pack
"""

import heapq

import numpy as np

from moejax.core.errors import check


def balanced_packing(weights: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """n items into packs of n / num_packs each: heaviest first, to the lightest pack with room.

    Returns int [n] each: the pack of every item, and its place in the pack. Ties go to the lower
    index, of items and of packs.

    >>> [a.tolist() for a in balanced_packing(np.array([5.0, 1.0, 4.0, 3.0]), 2)]
    [[0, 0, 1, 1], [0, 1, 0, 1]]
    """
    num_items = len(weights)
    check(num_items % num_packs == 0, f"{num_items} items are not divisible by {num_packs} packs")
    if num_items == num_packs:  # nothing to balance: items stay in order
        return np.arange(num_items), np.zeros(num_items, np.int64)
    pack, place = np.empty(num_items, np.int64), np.empty(num_items, np.int64)
    open_packs = [(0.0, index, 0) for index in range(num_packs)]  # load, pack, items
    for item in np.argsort(-weights, kind="stable"):
        load, index, held = heapq.heappop(open_packs)
        pack[item], place[item] = index, held
        if held + 1 < num_items // num_packs:
            heapq.heappush(open_packs, (load + float(weights[item]), index, held + 1))
    return pack, place


def replicate_experts(weights: np.ndarray, num_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """One more copy to the expert with the most load per copy, until all slots are full.

    Returns the expert of every slot, int [P], the first E in order, and the copies of every
    expert, int [E]. Minimises the load of the busiest copy.

    >>> [a.tolist() for a in replicate_experts(np.array([1.0, 6.0]), 4)]
    [[0, 1, 1, 1], [1, 3]]
    """
    num_experts = len(weights)
    check(num_slots >= num_experts, f"{num_slots} slots cannot hold {num_experts} experts")
    count = np.ones(num_experts, np.int64)
    slots = list(range(num_experts))
    for _ in range(num_slots - num_experts):
        busiest = int(np.argmax(weights / count))
        slots.append(busiest)
        count[busiest] += 1
    return np.asarray(slots), count


def rebalance(
    weights: np.ndarray,
    *,
    num_slots: int,
    num_ranks: int,
    num_groups: int = 1,
    num_nodes: int = 1,
) -> np.ndarray:
    """int32 [L, P]: the expert of every slot, for expected loads `weights` [L, E].

    Pass it to `from_phys_to_log`, with `twice_on_rank`: two copies can share a rank. Groups that
    do not divide over the nodes are ignored, as in EPLB. Raises `InputError` when slots, ranks,
    nodes and groups do not divide. Cost: a millisecond per layer of 256 experts.
    """
    weights = np.asarray(weights, np.float64)
    check(weights.ndim == 2, f"weights have shape {weights.shape}, expected [L, E]")
    check(
        bool((weights >= 0).all() and np.isfinite(weights).all()), "loads are not all finite >= 0"
    )
    sizes = dict(num_slots=num_slots, num_ranks=num_ranks, num_groups=num_groups)
    for name, size in (sizes | dict(num_nodes=num_nodes)).items():
        check(size >= 1, f"{name}={size} must be at least 1")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    num_experts = weights.shape[1]
    for what, total, part, parts in [
        ("num_experts", num_experts, "num_groups", num_groups),
        ("num_ranks", num_ranks, "num_nodes", num_nodes),
        ("num_slots", num_slots, "num_ranks", num_ranks),
    ]:
        check(total % parts == 0, f"{what}={total} is not divisible by {part}={parts}")
    layers = [_one_layer(row, num_slots, num_ranks, num_groups, num_nodes) for row in weights]
    return np.stack(layers).astype(np.int32)


def rank_loads(weights: np.ndarray, phys_to_log: np.ndarray, num_ranks: int) -> np.ndarray:
    """float [L, ranks]: load of every rank when the copies of an expert share it evenly."""
    loads = []
    for load, slots in zip(weights, phys_to_log, strict=True):
        count = np.bincount(slots, minlength=len(load))
        loads.append((load / count)[slots].reshape(num_ranks, -1).sum(1))
    return np.stack(loads)


def _one_layer(
    weights: np.ndarray, num_slots: int, num_ranks: int, num_groups: int, num_nodes: int
) -> np.ndarray:
    group_size = len(weights) // num_groups
    node, place = balanced_packing(weights.reshape(num_groups, -1).sum(1), num_nodes)
    groups = np.lexsort((place, node)).reshape(num_nodes, -1)  # of every node
    layer = []
    for held in groups:
        experts = (held[:, None] * group_size + np.arange(group_size)).reshape(-1)
        copies, count = replicate_experts(weights[experts], num_slots // num_nodes)
        load = (weights[experts] / count)[copies]
        rank, place = balanced_packing(load, num_ranks // num_nodes)
        layer.append(experts[copies[np.lexsort((place, rank))]])
    return np.concatenate(layer)
