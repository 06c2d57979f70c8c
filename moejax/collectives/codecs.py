"""Codecs: shorter messages, as projections.

A codec is a frozen value with `encode`, `decode` and `nbytes` (`schedule.Codec`). All here are
projections to the bit: coding what was decoded gives the same wire, so a rank may forward a code by
coding it again, and all that read it agree. Rows are coded one by one and keep their dtype; the
wire is one array of unsigned integers, which no backend widens.

A row with a NaN or an infinity comes back with one: it is not hidden.

Letters:
    M  rows of a message    n  elements of a row    b  elements of a block
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from moejax.core.errors import check


@dataclasses.dataclass(frozen=True)
class Bfloat16:
    """Half the bytes of float32; relative error at most 2**-9."""

    def encode(self, rows: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)

    def decode(self, wire: jax.Array, n: int, dtype: jnp.dtype) -> jax.Array:
        del n
        return lax.bitcast_convert_type(wire, jnp.bfloat16).astype(dtype)

    def nbytes(self, n: int, itemsize: int) -> int:
        del itemsize
        return 2 * n


@dataclasses.dataclass(frozen=True)
class BlockQuant:
    """Whole numbers of 8 or 4 bits with a scale per block, as in EQuARX (arXiv 2506.17615).

    The scale is a bfloat16: 127 times it is exact, so the largest element of a block comes back as
    127 scales and finds the same scale again. Error: at most 0.502 / 127 (8 bits) or 0.51 / 7 (4)
    of a block's largest element. The last block of a row is filled up with zeros; `nbytes` counts
    them. For float32 only: in a shorter type what is decoded would be rounded, and no projection.
    """

    bits: int = 8
    block: int = 256

    def __post_init__(self):
        check(self.bits in (4, 8), f"bits={self.bits} is not 4 or 8")
        even = self.block >= 2 and self.block % 2 == 0
        check(even, f"block={self.block} must be even and at least 2")

    @property
    def _top(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def encode(self, rows: jax.Array) -> jax.Array:
        check(rows.dtype == jnp.float32, f"{self} codes float32, got {rows.dtype}")
        m, n = rows.shape
        blocks = _blocks(n, self.block)
        x = jnp.pad(rows, ((0, 0), (0, blocks * self.block - n)))
        x = x.reshape(m, blocks, self.block)
        scale = (jnp.abs(x).max(-1) / self._top).astype(jnp.bfloat16)
        scale = jnp.where(scale < jnp.finfo(jnp.bfloat16).tiny, jnp.bfloat16(0), scale)
        step = scale.astype(jnp.float32)[..., None]
        whole = jnp.round(x / jnp.where(step > 0, step, 1.0))
        whole = jnp.clip(whole, -self._top, self._top).astype(jnp.int8).reshape(m, -1)
        payload = lax.bitcast_convert_type(whole, jnp.uint8)
        if self.bits == 4:
            payload = (payload[:, ::2] & 15) | (payload[:, 1::2] << 4)
        scales = lax.bitcast_convert_type(scale, jnp.uint8).reshape(m, -1)
        return jnp.concatenate([payload, scales], axis=1)

    def decode(self, wire: jax.Array, n: int, dtype: jnp.dtype) -> jax.Array:
        m, blocks = wire.shape[0], _blocks(n, self.block)
        payload, scales = jnp.split(wire, [blocks * self.block * self.bits // 8], axis=1)
        if self.bits == 4:
            both = jnp.stack([payload << 4, payload & 240], axis=-1).reshape(m, -1)
            whole = lax.bitcast_convert_type(both, jnp.int8) >> 4  # keeps the sign
        else:
            whole = lax.bitcast_convert_type(payload, jnp.int8)
        scale = lax.bitcast_convert_type(scales.reshape(m, blocks, 2), jnp.bfloat16)
        x = whole.reshape(m, blocks, self.block).astype(jnp.float32)
        x = x * scale.astype(jnp.float32)[..., None]
        return x.reshape(m, -1)[:, :n].astype(dtype)

    def nbytes(self, n: int, itemsize: int) -> int:
        del itemsize
        return _blocks(n, self.block) * (self.block * self.bits // 8 + 2)


@dataclasses.dataclass(frozen=True)
class TwoBit:
    """Minus a threshold, nothing, or plus a threshold: MXNet's gradient compression, 16 times.

    Of use with feedback only (`feedback`): what is below the threshold waits until it adds up.
    """

    threshold: float

    def __post_init__(self):
        check(self.threshold > 0, f"threshold={self.threshold} must be positive")

    def encode(self, rows: jax.Array) -> jax.Array:
        m, n = rows.shape
        limit = jnp.asarray(self.threshold, rows.dtype)
        codes = jnp.where(rows >= limit, 1, jnp.where(rows <= -limit, 2, 0)).astype(jnp.uint8)
        # 3 is what no number is.
        codes = jnp.where(jnp.isfinite(rows), codes, jnp.uint8(3))
        codes = jnp.pad(codes, ((0, 0), (0, -n % 4))).reshape(m, -1, 4)
        shifts = jnp.array([[[0, 2, 4, 6]]], jnp.uint8)
        return (codes << shifts).sum(-1, dtype=jnp.uint8)

    def decode(self, wire: jax.Array, n: int, dtype: jnp.dtype) -> jax.Array:
        shifts = jnp.array([[[0, 2, 4, 6]]], jnp.uint8)
        codes = (wire[..., None] >> shifts & 3).reshape(wire.shape[0], -1)[:, :n]
        values = jnp.array([0.0, self.threshold, -self.threshold, jnp.nan], dtype)
        return values[codes]

    def nbytes(self, n: int, itemsize: int) -> int:
        del itemsize
        return math.ceil(n / 4)


@dataclasses.dataclass(frozen=True)
class TopK:
    """The `k` largest elements of each block: a bfloat16 and a place for each.

    A place is a byte in blocks of up to 256, two in longer ones. Of use with feedback only, which
    also keeps what rounding loses. Blocks cost a little of the best choice, and make the search for
    it local and the places short. The last block of a row is filled up with zeros.
    """

    k: int
    block: int = 1024

    def __post_init__(self):
        check(2 <= self.block <= 2**16, f"block={self.block} must be between 2 and 65536")
        check(1 <= self.k <= self.block, f"k={self.k} must be between 1 and block={self.block}")

    @property
    def _place(self) -> jnp.dtype:
        return jnp.dtype(jnp.uint8 if self.block <= 256 else jnp.uint16)

    def encode(self, rows: jax.Array) -> jax.Array:
        m, n = rows.shape
        blocks = _blocks(n, self.block)
        x = jnp.pad(rows, ((0, 0), (0, blocks * self.block - n))).reshape(m, blocks, self.block)
        place = lax.top_k(jnp.abs(x), self.k)[1]
        values = jnp.take_along_axis(x, place, axis=2).astype(jnp.bfloat16)
        both = values, place.astype(self._place)
        raw = [lax.bitcast_convert_type(part, jnp.uint8).reshape(m, -1) for part in both]
        return jnp.concatenate(raw, axis=1)

    def decode(self, wire: jax.Array, n: int, dtype: jnp.dtype) -> jax.Array:
        m, blocks = wire.shape[0], _blocks(n, self.block)
        shape = (m, blocks, self.k)
        raw, places = jnp.split(wire, [2 * self.k * blocks], axis=1)
        values = lax.bitcast_convert_type(raw.reshape(*shape, 2), jnp.bfloat16).astype(dtype)
        pair = () if self._place.itemsize == 1 else (2,)
        place = lax.bitcast_convert_type(places.reshape(*shape, *pair), self._place)
        at = jnp.arange(m)[:, None, None], jnp.arange(blocks)[None, :, None]
        zeros = jnp.zeros((m, blocks, self.block), dtype)
        # A rank without a message decodes zeros, whose places are not unique.
        x = zeros.at[(*at, place.astype(jnp.int32))].set(values, mode="promise_in_bounds")
        return x.reshape(m, -1)[:, :n]

    def nbytes(self, n: int, itemsize: int) -> int:
        del itemsize
        return (2 + self._place.itemsize) * self.k * _blocks(n, self.block)


def _blocks(n: int, block: int) -> int:
    return -(-n // block)
