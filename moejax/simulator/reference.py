"""The cache replay in plain Python, obviously right: the oracle for `replay`.

Shares no code with the fast path, walks the trace itself and asks every resident entry for its key.
"""

import bisect
from collections.abc import Iterator

from moejax.data.routing_trace import RoutingTrace

Granule = tuple[int, int]  # (layer, expert)


def replay_reference(
    trace: RoutingTrace, policy: str, budget: int, *, clock: str = "lookup"
) -> list[tuple[int, int]]:
    """(misses, evictions) of every call of `trace` under a cache of `budget` bytes."""
    calls = list(_calls(trace))
    uses_at: dict[Granule, list[int]] = {}
    for now, granules in enumerate(calls):
        for granule in set(granules):
            uses_at.setdefault(granule, []).append(now)
    expert_bytes = trace.expert_bytes.tolist()
    per_layer = policy in ("layer", "layerlfu")
    budget = budget // trace.num_layers if per_layer else budget

    resident: set[Granule] = set()
    last_used: dict[Granule, int] = {}
    uses: dict[Granule, int] = {}
    time = 0
    result = []
    for now, granules in enumerate(calls):
        touched = list(dict.fromkeys(granules))
        for granule in touched:
            uses[granule] = uses.get(granule, 0) + 1
        for position, granule in enumerate(_by_last_touch(granules)):
            last_used[granule] = time + position if clock == "lookup" else time
        time += len(touched) if clock == "lookup" else 1

        misses = len(set(touched) - resident)
        resident |= set(touched)
        layer = granules[0][0]
        pool = {g for g in resident if g[0] == layer} if per_layer else set(resident)
        evictions = 0
        held = sum(expert_bytes[layer] for layer, _ in pool)
        while held > budget:
            candidates = pool - set(touched)
            if not candidates:
                break
            victim = min(
                candidates,
                key={
                    "lru": lambda g: (last_used[g], g),
                    "layer": lambda g: (last_used[g], g),
                    "lfu": lambda g: (uses[g], last_used[g], g),
                    "layerlfu": lambda g: (uses[g], last_used[g], g),
                    "random": lambda g, time=time: (_hash(trace, g, time), g),
                    "belady": lambda g, now=now: (-_next_use(uses_at[g], now), g),
                }[policy],
            )
            pool.remove(victim)
            resident.remove(victim)
            held -= expert_bytes[victim[0]]
            evictions += 1
        result.append((misses, evictions))
    return result


def _calls(trace: RoutingTrace) -> Iterator[list[Granule]]:
    start = 0
    for length, prompt in zip(trace.sequence_lengths, trace.prompt_lengths, strict=True):
        prefill = [range(start, start + prompt)] if prompt else []
        for tokens in [*prefill, *([t] for t in range(start + prompt, start + length))]:
            for layer in range(trace.num_layers):
                chosen = [int(e) for t in tokens for e in trace.topk_idx[layer, t]]
                granules = [(layer, e) for e in chosen if e != trace.num_experts]
                if granules:
                    yield granules
        start += length


def _by_last_touch(granules: list[Granule]) -> list[Granule]:
    """Distinct granules, the one whose last mention is earliest first."""
    last = {granule: at for at, granule in enumerate(granules)}
    return sorted(last, key=lambda granule: last[granule])


def _next_use(calls: list[int], now: int) -> float:
    at = bisect.bisect_right(calls, now)
    return calls[at] if at < len(calls) else float("inf")


def _hash(trace: RoutingTrace, granule: Granule, time: int) -> int:
    """The pseudo-random order of `moejax.offload.policies.random`, on Python integers."""
    mask = 0xFFFFFFFF
    index = granule[0] * trace.num_experts + granule[1]
    seed = (index + time * trace.num_layers * trace.num_experts) & mask
    mixed = ((seed ^ (seed >> 15)) * 2654435761) & mask
    mixed = ((mixed ^ (mixed >> 13)) * 2246822519) & mask
    return mixed >> 1
