"""Cache policies: which granule to evict next.

A policy is a function from usage counters to a key; the candidate with the smallest key goes. The
compiled offloaded step and the trace simulator call the very same functions, so what the simulator
says about a policy holds for the step.

Axis letters:
    N  granules, (layer, expert) pairs in layer-major order
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from moejax.costmodel.admission import average_scores

Key = tuple[jax.Array, jax.Array]  # int32 [N] each, compared in order
Policy = Callable[["Usage"], Key]
PolicyName = Literal["lru", "lfu", "random", "average"]

DECAY = 0.1  # of the moving average, per call of the layer


@struct.dataclass(kw_only=True)
class Usage:
    """Counters that policies read. They cover evicted granules too."""

    last_used: jax.Array  # int32 [N], clock of the last touch, -1 for never
    uses: jax.Array  # int32 [N], touches since the start
    average: jax.Array  # float32 [N], moving average of the rows per call of the layer
    clock: jax.Array  # int32 [], number of calls so far


def init_usage(num_granules: int) -> Usage:
    """Counters of a cache that has seen nothing."""
    return Usage(
        last_used=jnp.full((num_granules,), -1, jnp.int32),
        uses=jnp.zeros((num_granules,), jnp.int32),
        average=jnp.zeros((num_granules,), jnp.float32),
        clock=jnp.int32(0),
    )


def touch(usage: Usage, rows: jax.Array) -> Usage:
    """Counts one call of the layer that `usage` covers, with `rows` (int32 [N]) per granule."""
    touched = rows > 0
    return Usage(
        last_used=jnp.where(touched, usage.clock, usage.last_used),
        uses=usage.uses + touched.astype(jnp.int32),
        average=average_scores(usage.average, rows.astype(jnp.float32), DECAY),
        clock=usage.clock + 1,
    )


def lru(usage: Usage) -> Key:
    """Least recently used first."""
    return usage.last_used, jnp.zeros_like(usage.last_used)


def lfu(usage: Usage) -> Key:
    """Fewest uses since the start first; the least recent of equals."""
    return usage.uses, usage.last_used


def average(usage: Usage) -> Key:
    """Smallest moving average first (HybriMoE, arXiv 2504.05897); the least recent of equals."""
    # Floats that are not negative are in the order of their bits.
    return jax.lax.bitcast_convert_type(usage.average, jnp.int32), usage.last_used


def random(usage: Usage) -> Key:
    """A pseudo-random order that changes with every call (Knuth's multiplicative hash)."""
    n = usage.last_used.shape[0]
    seed = jnp.arange(n, dtype=jnp.uint32) + usage.clock.astype(jnp.uint32) * jnp.uint32(n)
    mixed = (seed ^ (seed >> 15)) * jnp.uint32(2654435761)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(2246822519)
    return (mixed >> 1).astype(jnp.int32), jnp.zeros_like(usage.last_used)


POLICIES: dict[PolicyName, Policy] = {
    "lru": lru,
    "lfu": lfu,
    "random": random,
    "average": average,
}


def pick_victim(key: Key, candidates: jax.Array) -> jax.Array:
    """Index of the candidate (bool [N], at least one) with the smallest key, as int32."""
    primary, secondary = key
    biggest = jnp.iinfo(jnp.int32).max
    best = jnp.min(jnp.where(candidates, primary, biggest))
    among = candidates & (primary == best)
    return jnp.argmin(jnp.where(among, secondary, biggest)).astype(jnp.int32)
