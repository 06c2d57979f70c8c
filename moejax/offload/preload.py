"""Fills a slot cache before the first token: hot experts, or all of them.

Axis letters:
    S  slots    E  experts of this rank    L  MoE layers
"""

import jax
import jax.numpy as jnp

from moejax.offload.policies import lru
from moejax.offload.slots import SlotCache, assign, choose_slot, write_row
from moejax.offload.source import Source


def preload(cache: SlotCache, source: Source, granules: jax.Array) -> SlotCache:
    """The cache after fetching `granules` (int32 [n], row `layer * E + expert`) in turn.

    Granules that are there already are skipped, and so are ids outside [0, L * E), so that lists
    of unequal length can be padded with -1; when a layer's slots are full its least recently
    used row goes. Cost: one transfer of an expert each. Call inside jit with the cache donated.
    """
    num_experts = source.num_experts
    nothing_wanted = jnp.zeros((num_experts,), bool)

    def load(_, carry):
        cache, granule = carry
        slot, _ = choose_slot(cache.table, granule // num_experts, lru, nothing_wanted)
        table = assign(cache.table, slot, granule)
        rows = write_row(cache.rows, slot, source.fetch(granule))
        return SlotCache(table=table, rows=rows), granule

    def visit(i, cache):
        granule, total = granules[i], cache.table.slot_of.shape[0]
        exists = (granule >= 0) & (granule < total)
        absent = exists & (cache.table.slot_of[jnp.clip(granule, 0, total - 1)] < 0)
        return jax.lax.fori_loop(0, absent.astype(jnp.int32), load, (cache, granule))[0]

    return jax.lax.fori_loop(0, granules.shape[0], visit, cache)
