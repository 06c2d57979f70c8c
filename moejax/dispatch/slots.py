"""Buffers of static shape: which slot of which destination each row takes, and the moves by it.

Rows are packed first come, first served, in token order; what finds its group full has no slot and
is counted. Both directions are gathers, and each is the gradient of the other, so nothing is ever
scattered: `slot` undoes `source`.

Axis letters:
    M  rows    J  destinations per row    G  groups    C  slots per group    D  model dim
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.kernels.permute import sort_by_group


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """How many slots a group gets: a number, a factor over the expected rows, or enough for all.

    >>> Capacity(factor=1.25).resolve(expected=10.0, bound=64)
    13
    >>> Capacity().resolve(expected=10.0, bound=64)
    64
    """

    slots: int | None = None
    factor: float | None = None

    def __post_init__(self):
        check(
            self.slots is None or self.factor is None,
            f"capacity has both slots={self.slots} and factor={self.factor}",
        )
        check(
            self.slots is None or (isinstance(self.slots, int) and self.slots >= 1),
            f"capacity slots={self.slots} is not a positive integer",
        )
        check(
            self.factor is None or 0 < self.factor < math.inf,
            f"capacity factor={self.factor} is not a positive number",
        )

    def resolve(self, *, expected: float, bound: int) -> int:
        """Slots per group; never more than `bound`, with which nothing can overflow."""
        if self.slots is not None:
            return min(self.slots, bound)
        if self.factor is not None:
            return min(math.ceil(self.factor * expected), bound)
        return bound


FITS_ALL = Capacity()
QUARTER_MORE = Capacity(factor=1.25)


@struct.dataclass(kw_only=True)
class Slots:
    """A bijection between slots and the (row, destination) pairs that have one."""

    source: jax.Array  # int32 [G * C], pair m * J + j that a slot holds; M * J in an empty one
    slot: jax.Array  # int32 [M, J], slot of each pair; G * C where it has none


def assign_slots(group: jax.Array, num_groups: int, capacity: int) -> tuple[Slots, jax.Array]:
    """Slots for the pairs of `group` (int32 [M, J]); ids outside [0, num_groups) want none.

    Returns the slots and bool [M, J], which pairs overflowed. Cost: one sort of M * J integers.
    """
    perm = sort_by_group(group, num_groups)
    starts = jnp.cumsum(perm.group_sizes) - perm.group_sizes
    column = jnp.arange(capacity, dtype=jnp.int32)[None]
    holder = perm.order.at[starts[:, None] + column].get(mode="clip")  # [G, C]
    source = jnp.where(column < perm.group_sizes[:, None], holder, group.size)
    wanted = (group >= 0) & (group < num_groups)
    position = perm.inverse.reshape(group.shape) - starts.at[group].get(mode="clip")
    kept = wanted & (position < capacity)
    slot = jnp.where(kept, group * capacity + position, num_groups * capacity)
    return Slots(source=source.reshape(-1), slot=slot), wanted & ~kept


def pack(x: jax.Array, slots: Slots) -> jax.Array:
    """Rows x [M, ...] at their slots: [G * C, ...], zero in empty ones."""
    return _pack(x, slots.source, slots.slot)


def collect(y: jax.Array, slots: Slots) -> jax.Array:
    """The transpose of `pack`: sums of each row's slots, y [G * C, ...] -> [M, ...]."""
    return _collect(y, slots.source, slots.slot)


def spread(y: jax.Array, slots: Slots) -> jax.Array:
    """Each pair's slot, unsummed: y [G * C, ...] -> [M, J, ...], zero for pairs without one."""
    return _spread(y, slots.source, slots.slot)


def _rows(a: jax.Array, index: jax.Array) -> jax.Array:
    return a.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _pack(x, source, slot):
    return _rows(x, source // slot.shape[1])


def _pack_fwd(x, source, slot):
    return _pack(x, source, slot), (source, slot)


def _pack_bwd(residuals, dy):
    return _collect(dy, *residuals), None, None


@jax.custom_vjp
def _collect(y, source, slot):
    terms = [_rows(y, slot[:, j]).astype(jnp.float32) for j in range(slot.shape[1])]
    return functools.reduce(jnp.add, terms).astype(y.dtype)


def _collect_fwd(y, source, slot):
    return _collect(y, source, slot), (source, slot)


def _collect_bwd(residuals, dx):
    return _pack(dx, *residuals), None, None


@jax.custom_vjp
def _spread(y, source, slot):
    return _rows(y, slot)


def _spread_fwd(y, source, slot):
    return _spread(y, source, slot), source


def _spread_bwd(source, dx):
    return _rows(dx.reshape(-1, *dx.shape[2:]), source), None, None


_pack.defvjp(_pack_fwd, _pack_bwd)
_collect.defvjp(_collect_fwd, _collect_bwd)
_spread.defvjp(_spread_fwd, _spread_bwd)
