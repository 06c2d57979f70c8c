"""Hit rates of a cache of every size at once: the stack algorithm.

A policy that ranks entries without regard to the size of the cache keeps a smaller cache's entries
in every larger one, so one list per layer, the stack, holds the caches of all sizes: size c holds
its first c entries (R. L. Mattson et al., IBM Systems Journal 9(2), 1970). A token's depth of an
expert, its place in the stack before the token, is the smallest cache that hits.

After every token the entries are ranked anew and each cache keeps the best of what it held and of
what the token used. Keeping the best c of a union can be done one newcomer at a time, and a
newcomer's way down the stack is a running minimum: at each place the better of newcomer and
occupant stays and the worse one goes on. That is one `minimum.accumulate` per chosen expert, for
all layers and sequences together.

Axis letters:
    B  caches: every layer of every sequence has its own      T  tokens of the longest sequence
    K  experts per token      E  experts
"""

from collections.abc import Callable, Iterator

import numpy as np

from moejax.data.routing_trace import RoutingTrace

_ABSENT = np.int64(-1)  # below every key
# A rank of experts from what was used up to and including a token; larger is kept. Called once per
# token, in order, with that token's experts, int32 [b, K] (E where absent), of the b <= B caches
# that are not at their end; returns int64 [b, E].
Rank = Callable[[int, np.ndarray], np.ndarray]


def caches_of_trace(trace: RoutingTrace, shortest: int = 1) -> np.ndarray:
    """Experts in the order in which every layer of every sequence saw them, int32 [B, T, K].

    Longest first. Tokens that a layer never saw are no part of its sequence. Sequences with fewer
    than `shortest` tokens of a layer are left out there; `too_short` counts them. Absent choices
    and the end of a short sequence hold E.
    """
    rows = [row for _, row in _layer_sequences(trace) if len(row) >= shortest]
    rows.sort(key=len, reverse=True)
    longest = max(map(len, rows), default=0)
    out = np.full((len(rows), longest, trace.top_k), trace.num_experts, np.int32)
    for cache, row in zip(out, rows, strict=True):
        cache[: len(row)] = row
    return out


def too_short(trace: RoutingTrace, shortest: int) -> int:
    """Sequences with fewer than `shortest` tokens in some layer."""
    return len({s for s, row in _layer_sequences(trace) if len(row) < shortest})


def _layer_sequences(trace: RoutingTrace) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (sequence, its tokens' experts [tokens, K]) of every layer."""
    present = np.any(trace.present, axis=-1)
    for s, (start, length) in enumerate(
        zip(trace.sequence_starts, trace.sequence_lengths, strict=True)
    ):
        for layer in range(trace.num_layers):
            tokens = slice(start, start + length)
            yield s, trace.topk_idx[layer, tokens][present[layer, tokens]]


def hits_by_size(chosen: np.ndarray, num_experts: int, rank: Rank) -> np.ndarray:
    """Hits of caches with 0 to E entries, summed over B, int64 [E + 1].

    `chosen` is int32 [B, T, K] with E where absent, longest first, as `caches_of_trace` gives it.
    Caches start empty, so the first use of an expert is a miss at every size. The cost is K running
    minima over E for every token.
    """
    caches, tokens, _ = chosen.shape
    going = np.sum((chosen < num_experts).any(-1), axis=0)  # caches with a token t
    stack = np.full((caches, num_experts), num_experts, np.int32)  # expert at each depth
    depth = np.full((caches, num_experts + 1), num_experts, np.int32)
    depths = np.zeros(num_experts + 1, np.int64)
    for t in range(tokens):
        b = going[t]
        now = chosen[:b, t]
        at = np.take_along_axis(depth[:b], now, axis=1)
        depths += np.bincount(at[now < num_experts], minlength=num_experts + 1)
        # One integer orders the experts and names them.
        keys = np.full((b, num_experts + 1), _ABSENT)
        keys[:, :-1] = rank(t, now) * num_experts + np.arange(num_experts)
        stack[:b] = _insert(stack[:b], at, keys, now)
        places = np.broadcast_to(np.arange(num_experts, dtype=np.int32), (b, num_experts))
        depth[:b] = num_experts
        np.put_along_axis(depth[:b], stack[:b], places, axis=1)
        depth[:b, -1] = num_experts  # what empty places wrote
    return np.concatenate([[0], np.cumsum(depths[:-1])])


def _insert(stack: np.ndarray, at: np.ndarray, keys: np.ndarray, now: np.ndarray) -> np.ndarray:
    """The stacks after a token: its experts leave their depths `at` and enter on top."""
    num_experts = stack.shape[1]
    ordered = np.concatenate([np.take_along_axis(keys, stack, axis=1), keys[:, -1:]], axis=1)
    np.put_along_axis(ordered, at, _ABSENT, axis=1)  # depth E is that extra column
    ordered = ordered[:, :-1]
    entering = np.take_along_axis(keys, now, axis=1)
    for slot in range(now.shape[1]):
        down = np.concatenate([entering[:, slot : slot + 1], ordered[:, :-1]], axis=1)
        going_on = np.minimum.accumulate(down, axis=1)
        ordered = np.maximum(going_on, ordered)
    return np.where(ordered == _ABSENT, num_experts, ordered % num_experts).astype(np.int32)
