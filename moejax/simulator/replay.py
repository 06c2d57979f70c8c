"""Replays calls through a cache of experts under a byte budget.

After every call the cache is brought down to its budget: entries go in the order of the policy's
key, except those that the call touched, which always stay. Keys and the choice of the victim are
the functions of `moejax.offload.policies`, the same that the compiled offloaded step runs. `layer`
and `layerlfu` give every layer an equal share of the budget and run LRU or LFU inside it; all other
policies treat the cache as one pool. `belady` (L. A. Belady, IBM Systems Journal 5, 1966) knows the
future and evicts the entry whose next use is the furthest call away.

Axis letters:
    C  calls      W  most distinct experts of one call      L  MoE layers      E  experts
    P  pools, 1 or L      M  granules of a pool: P * M = L * E
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moejax.core.errors import InputError, check
from moejax.offload.policies import Key, Policy, Usage, lfu, lru, pick_victim, random
from moejax.simulator.calls import Calls

Clock = Literal["lookup", "call"]


@dataclasses.dataclass(frozen=True)
class _Rule:
    key: Callable[[Usage, jax.Array], Key]  # from usage and next use, both of one pool
    per_layer: bool = False


def _online(policy: Policy, **kwargs) -> _Rule:
    return _Rule(lambda usage, next_use: policy(usage), **kwargs)


def _furthest_next_use(usage: Usage, next_use: jax.Array) -> Key:
    return -next_use, jnp.zeros_like(next_use)


RULES = {
    "lru": _online(lru),
    "lfu": _online(lfu),
    "random": _online(random),
    "layer": _online(lru, per_layer=True),
    "layerlfu": _online(lfu, per_layer=True),
    "belady": _Rule(_furthest_next_use),
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What the cache did in every call."""

    misses: np.ndarray  # int32 [C], distinct experts loaded
    evictions: np.ndarray  # int32 [C]
    resident_bytes: np.ndarray  # int64 [C], in the whole cache after the call
    over_budget: np.ndarray  # bool [C], the call alone needs more than the budget (of its layer)


@struct.dataclass(kw_only=True)
class _Cache:
    resident: jax.Array  # bool [P, M]
    last_used: jax.Array  # int32 [P, M]
    uses: jax.Array  # int32 [P, M]
    next_use: jax.Array  # int32 [P, M]
    clock: jax.Array  # int32 []
    held: jax.Array  # int32 [P], units of memory in use


def replay(calls: Calls, policy: str, budget: int, *, clock: Clock = "lookup") -> Outcome:
    """Replays `calls` through a cache of `budget` bytes (int) under a policy of `RULES`.

    `clock='lookup'` orders the experts of one call by their last touch, as engines with a host-side
    cache do; `'call'` gives them the same time, as the compiled step does. `InputError` for an
    unknown policy or a budget that cannot hold one expert of each slot of a token in one layer.
    """
    check(policy in RULES, f"policy {policy!r} is unknown; there are {', '.join(RULES)}")
    smallest = calls.top_k * int(calls.expert_bytes.max())
    check(
        budget >= smallest,
        f"a budget of {budget} bytes cannot hold the {calls.top_k} experts of one token in one"
        f" layer, {smallest} bytes",
    )
    rule = RULES[policy]
    if rule.per_layer:
        budget //= len(calls.expert_bytes)
    return _replay(calls, rule, calls.expert_bytes, budget, clock)


def replay_slots(calls: Calls, policy: str, slots: int, *, clock: Clock = "call") -> Outcome:
    """Replays `calls` through `slots` slots per layer: every expert counts one byte.

    `policy` is `lru`, `lfu`, `random` or `belady`, applied inside every layer.
    """
    known = [name for name, rule in RULES.items() if not rule.per_layer]
    check(policy in known, f"policy {policy!r} is unknown; inside a layer there are {known}")
    check(
        slots >= calls.top_k,
        f"slots={slots} cannot hold the {calls.top_k} experts of one token",
    )
    rule = dataclasses.replace(RULES[policy], per_layer=True)
    return _replay(calls, rule, np.ones_like(calls.expert_bytes), slots, clock)


def _replay(calls: Calls, rule: _Rule, sizes: np.ndarray, budget: int, clock: Clock) -> Outcome:
    # int32 holds any cache when memory is counted in the largest unit that divides all sizes.
    unit = int(np.gcd.reduce(sizes))
    everything = int(sizes.sum()) * calls.num_experts // unit
    if everything > np.iinfo(np.int32).max:
        raise InputError(f"expert sizes {np.unique(sizes)[:8]} share only the factor {unit}")
    misses, evictions, held, over = _scan(
        calls.layer,
        calls.granules,
        calls.next_use,
        (sizes // unit).astype(np.int32),
        np.int32(min(budget // unit, everything)),
        key=rule.key,
        pools=len(sizes) if rule.per_layer else 1,
        num_experts=calls.num_experts,
        clock=clock,
    )
    return Outcome(
        misses=np.asarray(misses),
        evictions=np.asarray(evictions),
        resident_bytes=np.asarray(held).astype(np.int64) * unit,
        over_budget=np.asarray(over),
    )


@partial(jax.jit, static_argnames=("key", "pools", "num_experts", "clock"))
def _scan(layer, granules, next_use, sizes, budget, *, key, pools, num_experts, clock):
    m = sizes.shape[0] * num_experts // pools

    def empty(value):
        return jnp.full((pools, m), value, jnp.int32)

    cache = _Cache(
        resident=jnp.zeros((pools, m), bool),
        last_used=empty(-1),
        uses=empty(0),
        next_use=empty(layer.shape[0]),
        clock=jnp.int32(0),
        held=jnp.zeros((pools,), jnp.int32),
    )

    def call(cache: _Cache, x):
        layer, granules, next_use = x
        pool = layer if pools > 1 else jnp.int32(0)
        index = jnp.where(granules < pools * m, granules - pool * m, m)  # m: dropped by scatters
        cache, misses = _look_up(cache, pool, index, next_use, sizes[layer], clock)
        touched = jnp.zeros((m,), bool).at[index].set(True, mode="drop")
        cache, evictions = _evict(cache, pool, touched, sizes, budget, key, num_experts)
        return cache, (misses, evictions, cache.held.sum(), cache.held[pool] > budget)

    return jax.lax.scan(call, cache, (layer, granules, next_use))[1]


def _look_up(cache: _Cache, pool, index, next_use, size, clock: Clock) -> tuple[_Cache, jax.Array]:
    """Makes the granules `index` (int32 [W]) of a pool resident; returns the misses."""
    with jax.named_scope("cache_look_up"):
        wanted = index < cache.resident.shape[1]
        lookups = wanted.sum(dtype=jnp.int32)
        found = cache.resident.at[pool, index].get(mode="fill", fill_value=False)
        misses = lookups - found.sum(dtype=jnp.int32)
        if clock == "lookup":
            now, later = cache.clock + jnp.arange(len(index), dtype=jnp.int32), lookups
        else:
            now, later = cache.clock, jnp.int32(1)
        return _Cache(
            resident=cache.resident.at[pool, index].set(True, mode="drop"),
            last_used=cache.last_used.at[pool, index].set(now, mode="drop"),
            uses=cache.uses.at[pool, index].add(1, mode="drop"),
            next_use=cache.next_use.at[pool, index].set(next_use, mode="drop"),
            clock=cache.clock + later,
            held=cache.held.at[pool].add(misses * size),
        ), misses


def _evict(cache: _Cache, pool, touched, sizes, budget, key, num_experts):
    """Evicts untouched granules of a pool until it fits; returns the cache and how many went."""
    with jax.named_scope("cache_evict"):
        usage = Usage(
            last_used=cache.last_used[pool],
            uses=cache.uses[pool],
            average=jnp.zeros(touched.shape, jnp.float32),  # of rows, which calls do not say
            clock=cache.clock,
        )
        order = key(usage, cache.next_use[pool])
        of_layer = jnp.arange(touched.shape[0], dtype=jnp.int32) // num_experts + pool

        def over(state):
            resident, held, _ = state
            return (held > budget) & jnp.any(resident & ~touched)

        def evict(state):
            resident, held, count = state
            victim = pick_victim(order, resident & ~touched)
            return resident.at[victim].set(False), held - sizes[of_layer[victim]], count + 1

        start = (cache.resident[pool], cache.held[pool], jnp.int32(0))
        resident, held, count = jax.lax.while_loop(over, evict, start)
        return dataclasses.replace(
            cache,
            resident=cache.resident.at[pool].set(resident),
            held=cache.held.at[pool].set(held),
        ), count
