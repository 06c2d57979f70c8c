"""Every rank against a cache of one size that is simulated token by token, in plain Python."""

import pytest

from moejax.simulator import ranks
from moejax.simulator.stack import caches_of_trace, hits_by_size
from tests.simulator.test_stack import random_trace

EXPERTS = 7


def slow_hits(sequence, size, kind, future=0):
    """Hits of one cache of `size` entries on a list of tokens, each a list of experts."""
    cache, last, uses, hits = set(), {}, {}, 0
    for t, token in enumerate(sequence):
        hits += len(cache & set(token))
        for slot, expert in enumerate(token):
            last[expert], uses[expert] = (t, slot), uses.get(expert, 0) + 1

        def value(expert, t=t, token=token):
            later = [s for s in range(t + 1, len(sequence)) if expert in sequence[s]]
            return {
                "lru": (last[expert],),
                "lfu": (expert in token, uses[expert], last[expert]),
                "belady": (-min(later, default=len(sequence)), last[expert]),
                "sch": (sum(s <= t + future for s in later), last[expert]),
            }[kind]

        cache = set(sorted(cache | set(token), key=value, reverse=True)[:size])
    return hits


@pytest.mark.parametrize(
    ("kind", "future"), [("lru", 0), ("lfu", 0), ("belady", 0), ("sch", 1), ("sch", 4), ("sch", 99)]
)
def test_equals_one_cache_at_a_time(kind, future):
    chosen = caches_of_trace(random_trace(3))
    rank = getattr(ranks, kind)(chosen, EXPERTS, *([future] if future else []))
    hits = hits_by_size(chosen, EXPERTS, rank)
    sequences = [[[e for e in token if e < EXPERTS] for token in row] for row in chosen.tolist()]
    sequences = [[token for token in sequence if token] for sequence in sequences]
    slow = [
        sum(slow_hits(sequence, size, kind, future) for sequence in sequences)
        for size in range(EXPERTS + 1)
    ]
    assert hits.tolist() == slow


def test_no_online_cache_and_no_shorter_sight_beats_belady():
    chosen = caches_of_trace(random_trace(4, experts=7))
    best = hits_by_size(chosen, 7, ranks.belady(chosen, 7))
    for rank in (ranks.lru(chosen, 7), ranks.lfu(chosen, 7), ranks.sch(chosen, 7, 4)):
        assert (hits_by_size(chosen, 7, rank) <= best).all()
