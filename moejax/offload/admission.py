"""Admission: what an idle link brings into the cache although nobody has asked for it.

The rule is HybriMoE's (minus recent score, arXiv 2504.05897): the absent expert of the highest
moving average of rows takes the place of the cached one of the lowest. It travels in a prefetch
lane that no prediction wants, for the coming layer, and takes its slot when that layer has served
its misses, if it is still worth more than what it would evict.

Axis letters:
    E  experts of this rank    S  slots    m  prefetch lanes
"""

import jax
import jax.numpy as jnp

from moejax.offload.slots import SlotTable, may_serve


def rank_by_average(votes: jax.Array, table: SlotTable, layer: jax.Array) -> jax.Array:
    """float32 [E]: `votes` of at least 1, and below zero the others in order of their average."""
    size = votes.shape[0]
    average = jax.lax.dynamic_slice(table.usage.average, (layer * size,), (size,))
    return jnp.where(votes >= 1.0, votes, -1.0 / (1.0 + average))


def is_worth_moving(table: SlotTable, layer: jax.Array, granule: jax.Array) -> jax.Array:
    """bool [m]: absent granules (int32 [m]) of a higher average than `layer` has in some slot."""
    average = table.usage.average
    held = jnp.where(table.granule_of < 0, 0.0, average[table.granule_of])
    least = jnp.min(jnp.where(may_serve(table, layer), held, jnp.inf))
    return (table.slot_of[granule] < 0) & (average[granule] > least)


def is_worth_slot(table: SlotTable, slot: jax.Array, granule: jax.Array) -> jax.Array:
    """bool []: `slot` is empty, or holds an expert of a lower average than that of `granule`."""
    held, average = table.granule_of[slot], table.usage.average
    return (held < 0) | (average[granule] > average[held])
