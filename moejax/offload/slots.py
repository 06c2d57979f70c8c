"""The slot cache: device rows for some experts, and the table that says which.

The cache is a carry of the compiled step: looked up, filled and evicted on the device, with no host
round trip. It is not authoritative; dropping it costs fetches, never correctness.

Axis letters:
    S  slots    N  granules, (layer, expert) pairs    L  MoE layers    E  experts of this rank
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.rows import to_bits
from moejax.offload.policies import Policy, Usage, init_usage, pick_victim, touch


@struct.dataclass(kw_only=True)
class SlotTable:
    """Which granule each slot holds. `slot_of` and `granule_of` are inverse where not -1."""

    slot_of: jax.Array  # int32 [N], -1 when absent
    granule_of: jax.Array  # int32 [S], -1 when empty
    slot_layer: jax.Array  # int32 [S], the only layer a slot serves, or -1 for any
    usage: Usage  # counters [N]
    is_low: jax.Array | None = None  # bool [S], landed in few bits; None where nothing does


@struct.dataclass(kw_only=True)
class SlotCache:
    """The table and the device rows it speaks of."""

    table: SlotTable
    rows: GatedWeights  # leaves [S, ...]; bfloat16 as the bits that `kernels.rows` explains


def init_table(
    num_layers: int, num_experts: int, slot_layer: jax.Array, *, two_precisions: bool = False
) -> SlotTable:
    """An empty table with `len(slot_layer)` slots."""
    granules, slots = num_layers * num_experts, slot_layer.shape[0]
    return SlotTable(
        slot_of=jnp.full((granules,), -1, jnp.int32),
        granule_of=jnp.full((slots,), -1, jnp.int32),
        slot_layer=slot_layer.astype(jnp.int32),
        usage=init_usage(granules),
        is_low=jnp.zeros((slots,), bool) if two_precisions else None,
    )


def shared_slots(num_slots: int) -> jax.Array:
    """`slot_layer` of one pool for all layers.

    Least-recently-used eviction never hits when the pool is smaller than one token's experts over
    all layers; see `costmodel.offload_bounds`.
    """
    return jnp.full((num_slots,), -1, jnp.int32)


def layer_slots(num_slots: int, num_layers: int) -> jax.Array:
    """`slot_layer` of equal quotas per layer, the remainder to the first layers."""
    check(
        num_slots >= num_layers,
        f"num_slots={num_slots} is fewer than one for each of {num_layers} MoE layers",
    )
    return jnp.sort(jnp.arange(num_slots, dtype=jnp.int32) % num_layers)


def quota_slots(quotas: tuple[int, ...]) -> jax.Array:
    """`slot_layer` of `quotas[l]` slots for layer l, such as `costmodel.quotas` finds."""
    return jnp.repeat(
        jnp.arange(len(quotas), dtype=jnp.int32),
        jnp.array(quotas, jnp.int32),
        total_repeat_length=sum(quotas),
    )


def init_cache(
    experts: GatedWeights, slot_layer: jax.Array, *, two_precisions: bool = False
) -> SlotCache:
    """An empty cache for a store with leaves [L, E, ...] (arrays or abstract)."""
    num_layers, num_experts = experts.w_gate.shape[:2]
    slots = slot_layer.shape[0]
    rows = jax.tree.map(
        lambda leaf: to_bits(jnp.zeros((slots, *leaf.shape[2:]), leaf.dtype)), experts
    )
    table = init_table(num_layers, num_experts, slot_layer, two_precisions=two_precisions)
    return SlotCache(table=table, rows=rows)


def touch_layer(table: SlotTable, layer: jax.Array, rows: jax.Array) -> SlotTable:
    """Counts one call of `layer` with `rows` (int32 [E]) per expert, see `policies.touch`."""
    start, size = (layer * rows.shape[0],), rows.shape

    def cut(leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(leaf, start, size) if leaf.ndim else leaf

    def paste(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(leaf, new, start) if leaf.ndim else new

    usage = touch(jax.tree.map(cut, table.usage), rows)
    return dataclasses.replace(table, usage=jax.tree.map(paste, table.usage, usage))


def layer_slot_of(table: SlotTable, layer: jax.Array, num_experts: int) -> jax.Array:
    """int32 [E]: the slot of each expert of `layer`, -1 when absent."""
    return jax.lax.dynamic_slice(table.slot_of, (layer * num_experts,), (num_experts,))


def forget_low(table: SlotTable, layer: jax.Array, important: jax.Array) -> SlotTable:
    """The table without experts of `layer` that landed in few bits and are `important` (bool [E]).

    They are missing now, and their slots empty.
    """
    assert table.is_low is not None, "the table knows one precision"
    slots = layer_slot_of(table, layer, important.shape[0])
    gone = important & (slots >= 0) & table.is_low[jnp.maximum(slots, 0)]
    emptied = jnp.where(gone, slots, table.granule_of.shape[0])  # the others go out of range
    kept = jnp.where(gone, -1, slots)
    start = (layer * important.shape[0],)
    return dataclasses.replace(
        table,
        slot_of=jax.lax.dynamic_update_slice(table.slot_of, kept, start),
        granule_of=table.granule_of.at[emptied].set(-1, mode="drop"),
    )


def num_slots_of(table: SlotTable, layer: jax.Array) -> jax.Array:
    """int32 []: how many slots may serve `layer`."""
    return jnp.sum(may_serve(table, layer), dtype=jnp.int32)


def choose_slot(
    table: SlotTable, layer: jax.Array, policy: Policy, wanted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The slot to overwrite for `layer`, and whether it holds none of the layer's wanted experts.

    Empty slots go first, then by `policy` among slots that may serve `layer` and hold nothing that
    `wanted` (bool [E]) names; when every slot holds a wanted expert, by policy among those.
    """
    num_experts = wanted.shape[0]
    held = jnp.maximum(table.granule_of, 0)
    empty = table.granule_of < 0
    expert = table.granule_of - layer * num_experts
    mine = (expert >= 0) & (expert < num_experts)
    busy = mine & wanted[jnp.clip(expert, 0, num_experts - 1)]
    allowed = may_serve(table, layer)
    free = allowed & ~busy
    any_free = jnp.any(free)
    primary, secondary = (
        jnp.where(empty, jnp.iinfo(jnp.int32).min, part[held]) for part in policy(table.usage)
    )
    return pick_victim((primary, secondary), jnp.where(any_free, free, allowed)), any_free


def assign(
    table: SlotTable, slot: jax.Array, granule: jax.Array, *, low: bool = False
) -> SlotTable:
    """The table after `granule` has replaced whatever `slot` held; `low` if it came in few bits."""
    evicted = table.granule_of[slot]
    # An empty slot evicts nothing: -1 would wrap to the last granule, so it goes out of range.
    evicted = jnp.where(evicted < 0, table.slot_of.shape[0], evicted)
    slot_of = table.slot_of.at[evicted].set(-1, mode="drop")
    return dataclasses.replace(
        table,
        slot_of=slot_of.at[granule].set(slot),
        granule_of=table.granule_of.at[slot].set(granule),
        is_low=None if table.is_low is None else table.is_low.at[slot].set(low),
    )


def write_row(rows: GatedWeights, slot: jax.Array, expert: GatedWeights) -> GatedWeights:
    """The rows with `expert` (leaves without leading axis) at `slot`, in place when donated."""

    def write(leaf: jax.Array, row: jax.Array) -> jax.Array:
        row = row if leaf.dtype == row.dtype else to_bits(row)
        return jax.lax.dynamic_update_index_in_dim(leaf, row, slot, 0)

    return jax.tree.map(write, rows, expert)


def may_serve(table: SlotTable, layer: jax.Array) -> jax.Array:
    """bool [S]: the slots that `layer` may take."""
    return (table.slot_layer < 0) | (table.slot_layer == layer)
