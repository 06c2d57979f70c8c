"""What one layer call wants, in the order in which it is served.

Cached experts come first: they can be computed at once. Missing ones follow, those with most rows
first, since the host, which computes those at the end, takes time by the row (`misses.py`). *Late*
experts wait in landing buffers for a slot that has been computed (`waves.py`).

Axis letters:
    E  experts of this rank
"""

import jax
import jax.numpy as jnp
from flax import struct

from moejax.offload.slots import SlotTable, layer_slot_of, num_slots_of


@struct.dataclass(kw_only=True)
class Work:
    """One layer call, experts in processing order: cached, missing, late, unwanted.

    Of the missing ones the first `num_moved` are fetched; the host computes the others (`host.py`).
    Of these the first `num_full` are fetched in full, the others in few bits (`precision.py`).
    """

    layer: jax.Array  # int32 []
    order: jax.Array  # int32 [E], expert ids
    wanted: jax.Array  # bool [E], by expert id
    late: jax.Array  # bool [E], by expert id: landed, and without a slot before the last wave
    num_cached: jax.Array  # int32 [], wanted and in the cache
    num_missing: jax.Array  # int32 [], at least 1 when any is late
    num_moved: jax.Array  # int32 [], of these, fetched by demand; all of them when any is late
    num_late: jax.Array  # int32 []
    num_free: jax.Array  # int32 [], slots of the layer that hold nothing wanted; 0 when any is late
    num_full: jax.Array | None = None  # int32 []; None where all of them are


def sort_experts(
    table: SlotTable,
    layer: jax.Array,
    wanted: jax.Array,
    landed: jax.Array,
    rows: jax.Array,
    important: jax.Array | None = None,
) -> Work:
    """Puts the experts of `layer` in processing order: missing ones with most rows first, ids
    ascend among equals and in the other classes. All missing ones are to be moved.

    Args: `wanted` bool [E]; `landed` bool [E], in a landing buffer; `rows` int32 [E]; `important`
    bool [E], to be moved in full, which go before the other missing ones; None for all. One absent
    expert is missing even if it has landed, since the slots are free for late ones only behind a
    wave that fetches; and the last missing one keeps its slot.
    """
    absent = wanted & (layer_slot_of(table, layer, wanted.shape[0]) < 0)
    waiting = absent & landed
    num_slots = num_slots_of(table, layer)
    room = jnp.minimum(jnp.sum(absent, dtype=jnp.int32), num_slots) - 1
    late = waiting & (jnp.cumsum(waiting, dtype=jnp.int32) <= room)
    missing = absent & ~late
    low = jnp.zeros_like(missing) if important is None else missing & ~important
    rank = jnp.where(low, 2, missing.astype(jnp.int32))
    rank = jnp.where(wanted, jnp.where(late, 3, rank), 4)
    num_cached = jnp.sum(rank == 0, dtype=jnp.int32)
    num_missing = jnp.sum(missing, dtype=jnp.int32)
    most = jnp.max(rows) + 1
    fewer = jnp.where(missing, most - rows, 0)
    return Work(
        layer=layer,
        order=jnp.argsort(rank * (most + 1) + fewer, stable=True).astype(jnp.int32),
        wanted=wanted,
        late=late,
        num_cached=num_cached,
        num_missing=num_missing,
        num_moved=num_missing,
        num_late=jnp.sum(late, dtype=jnp.int32),
        num_free=num_slots - num_cached,
        num_full=None if important is None else num_missing - jnp.sum(low, dtype=jnp.int32),
    )


def num_joined(work: Work) -> jax.Array:
    """int32 []: how many of the moved experts wave 0 computes, beside the cached ones: on CPU."""
    return jax.lax.platform_dependent(
        work.num_moved, work.num_free, cpu=jnp.minimum, default=lambda moved, free: moved - moved
    )


def num_waves(work: Work) -> jax.Array:
    """int32 []: how often `run_missing` and `run_last` compute."""
    return 1 + work.num_moved - num_joined(work)


def last_wave(work: Work) -> jax.Array:
    """bool [E], by expert id: what `run_last` computes, and wants in the cache."""
    first, last = last_wave_bounds(work)
    position = jnp.arange(work.order.shape[0], dtype=jnp.int32)
    inside = (position >= first) & (position < last)
    return jnp.zeros_like(inside).at[work.order].set(inside)


def last_wave_bounds(work: Work) -> tuple[jax.Array, jax.Array]:
    """First and end, int32 [], of the places in the processing order that `run_last` computes."""
    moved = work.num_cached + work.num_moved
    first = jnp.where(work.num_moved == num_joined(work), 0, moved - 1)
    return first, moved + work.num_late
