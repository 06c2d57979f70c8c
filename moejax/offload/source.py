"""Where the rows of missing experts come from: host memory, or files on disk.

A source is all that the offloaded stage knows of the tiers below the device. `HostSource` is slices
of `pinned_host` arrays, part of the compiled program. `DiskSource` calls back to the host, once per
expert: the operating system may have to wait for a disk, which no compiled program can.

Axis letters:
    L  MoE layers    E  experts of this rank    N  granules, L * E
"""

from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import io_callback

from moejax.core.memory import fetch_rows
from moejax.experts.shard import first_expert
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.quantized import dequantize_tree
from moejax.kernels.vma import vary_together
from moejax.offload.disk import DiskExperts
from moejax.offload.precision import TwoPrecisions
from moejax.offload.store import expert_bytes, flatten

# All experts of a model: arrays [L, E, ...] in `pinned_host`, once or twice, or an opened folder.
Store: TypeAlias = GatedWeights | TwoPrecisions | DiskExperts


class Source(Protocol):
    """The experts of this rank, one at a time; a pytree whose methods run inside jit.

    A granule is `layer * E + expert`, of this rank's experts.
    """

    @property
    def num_layers(self) -> int: ...

    @property
    def num_experts(self) -> int:
        """E."""
        ...

    def fetch(self, granule: jax.Array) -> GatedWeights:
        """Expert `granule` (int32 []) on its way to the device, leaves without leading axes."""
        ...

    def announce(self, granules: jax.Array, live: jax.Array) -> jax.Array:
        """Says that `granules` (int32 [n]) where `live` (bool [n]) will be fetched soon.

        Returns `granules`; what reads them there comes after the announcement.
        """
        ...


@struct.dataclass(kw_only=True)
class HostSource:
    """Rows of host memory. Cost: one transfer per leaf and fetch, none per announcement."""

    rows: GatedWeights  # [N, ...]
    num_experts: int = struct.field(pytree_node=False)
    low: GatedWeights | None = None  # [N, ...], the same in few bits

    @property
    def num_layers(self) -> int:
        return self.rows.w_gate.shape[0] // self.num_experts

    def fetch(self, granule: jax.Array) -> GatedWeights:
        return fetch_rows(self.rows, granule)

    def fetch_low(self, granule: jax.Array) -> GatedWeights:
        """Expert `granule` in few bits, for `widen`. Cost: two transfers per matrix."""
        assert self.low is not None, "the experts are there in one precision"
        return fetch_rows(self.low, granule)

    def widen(self, expert: GatedWeights) -> GatedWeights:
        """What `fetch_low` gave, in the dtype of what `fetch` gives."""
        return dequantize_tree(expert, self.rows.w_gate.dtype)

    def announce(self, granules: jax.Array, live: jax.Array) -> jax.Array:
        del live  # it is there already
        return granules


@struct.dataclass(kw_only=True)
class DiskSource:
    """Rows of files. Cost: one call to the host per fetch, and per announcement of any."""

    first: jax.Array  # int32 [], what the first expert of this rank is called in the files
    disk: DiskExperts = struct.field(pytree_node=False)
    num_experts: int = struct.field(pytree_node=False)

    @property
    def num_layers(self) -> int:
        return self.disk.shapes.w_gate.shape[0]

    def fetch(self, granule: jax.Array) -> GatedWeights:
        granule = self._in_files(granule)
        row = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), self.disk.shapes
        )
        # A pure callback would be hoisted out of the loops that say whether there is one to fetch.
        return vary_together(io_callback(self.disk.row, row, granule), granule)[0]

    def announce(self, granules: jax.Array, live: jax.Array) -> jax.Array:
        named = jnp.where(live, self._in_files(granules), -1)
        same = jax.ShapeDtypeStruct(named.shape, named.dtype)

        def tell(_, told: jax.Array) -> jax.Array:
            return vary_together(io_callback(self.disk.will_need, same, told), told)[0]

        # A loop of at most one trip: no call where there is nothing to say.
        told = jax.lax.fori_loop(0, jnp.any(live).astype(jnp.int32), tell, named)
        return granules + (told - named)  # zero, which no compiler knows

    def _in_files(self, granule: jax.Array) -> jax.Array:
        layer, expert = granule // self.num_experts, granule % self.num_experts
        return layer * self.disk.shapes.w_gate.shape[1] + self.first + expert


def source_of(store: Store, axis: str | None = None) -> Source:
    """The source of this rank's experts; `axis` is what they are sharded over in `shard_map`."""
    if isinstance(store, GatedWeights):
        return HostSource(rows=flatten(store), num_experts=store.w_gate.shape[1])
    if isinstance(store, TwoPrecisions):
        num_experts = store.full.w_gate.shape[1]
        rows, low = flatten(store.full), flatten(store.low)
        return HostSource(rows=rows, num_experts=num_experts, low=low)
    ranks = 1 if axis is None else jax.lax.axis_size(axis)
    own = store.shapes.w_gate.shape[1] // ranks
    return DiskSource(first=first_expert(axis, own), disk=store, num_experts=own)


def shapes_of(store: Store) -> GatedWeights:
    """What slots hold of a store, leaves [L, E, ...] with a shape and a dtype."""
    if isinstance(store, TwoPrecisions):
        return store.full
    return store if isinstance(store, GatedWeights) else store.shapes


def moved_bytes(store: Store, *, fetches: float, low_fetches: float = 0) -> float:
    """Bytes that so many `fetches` from `store` move, of which `low_fetches` are in few bits."""
    low = expert_bytes(store.low) if isinstance(store, TwoPrecisions) else 0
    return (fetches - low_fetches) * expert_bytes(shapes_of(store)) + low_fetches * low
