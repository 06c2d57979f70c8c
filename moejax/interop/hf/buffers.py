"""Host memory in which a jax array is put together, one buffer per distinct shard.

XLA:CPU takes a buffer that is aligned to 64 bytes as it is, in every memory kind; other platforms
copy it, straight to the memory that the sharding says.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from moejax.experts.quantize import quantize_matrix
from moejax.kernels.quantized import Quantized

_ALIGNMENT = 64
Bounds = tuple[tuple[int, int], ...]  # first and last + 1, per axis


class Buffers:
    """The shards of one array that this process holds, to be filled."""

    def __init__(self, leaf: jax.ShapeDtypeStruct):
        """`leaf` has a sharding; nothing is allocated for shards of other processes."""
        self.leaf = leaf
        indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
        self._bounds: dict[jax.Device, Bounds] = {
            device: tuple(s.indices(n)[:2] for s, n in zip(index or (), leaf.shape, strict=True))
            for device, index in indices.items()
        }
        self._arrays = {
            bounds: aligned(tuple(stop - start for start, stop in bounds), leaf.dtype)
            for bounds in self._bounds.values()
        }

    def put(self, index: tuple[int, ...], value: np.ndarray) -> int:
        """Writes `value` at `index` of the array's leading axes, cast; returns its bytes.

        Only those axes may be sharded.
        """
        for bounds, array in self._arrays.items():
            leading = bounds[: len(index)]
            if all(start <= i < stop for i, (start, stop) in zip(index, leading, strict=True)):
                local = tuple(i - start for i, (start, _) in zip(index, leading, strict=True))
                array[local] = value
        return math.prod(value.shape) * self.leaf.dtype.itemsize

    def finish(self) -> jax.Array:
        """The array. The buffers are part of it (CPU) or freed once they are copied."""
        kind = self.leaf.sharding.memory_kind
        shards = [
            jax.device_put(self._arrays[bounds], SingleDeviceSharding(device, memory_kind=kind))
            for device, bounds in self._bounds.items()
        ]
        jax.block_until_ready(shards)
        self._arrays = {}
        return jax.make_array_from_single_device_arrays(self.leaf.shape, self.leaf.sharding, shards)


class QuantizedBuffers:
    """The same for matrices that are quantised one by one, as they come."""

    def __init__(self, leaf: Quantized, name: str):
        """`leaf` is abstract, see `experts.quantize.abstract_quantized`; `name` is for errors."""
        parts: Any = leaf  # of shapes, not of arrays
        self.format, self.name = parts.format, name
        self._parts = (Buffers(parts.q), Buffers(parts.scale))

    def put(self, index: tuple[int, ...], value: np.ndarray) -> int:
        """Writes the matrix `value`, of any dtype, at `index`; returns its quantised bytes.

        Raises `InputError` for weights that are not finite.
        """
        both = quantize_matrix(value, self.format, f"{self.name}{list(index)}")
        return sum(part.put(index, array) for part, array in zip(self._parts, both, strict=True))

    def finish(self) -> Quantized:
        """The quantised matrices."""
        q, scale = (part.finish() for part in self._parts)
        return Quantized(q=q, scale=scale, format=self.format)


def make_buffers(name: str, leaf: jax.ShapeDtypeStruct | Quantized) -> Buffers | QuantizedBuffers:
    """Room for one parameter; what is put there is quantised where `leaf` is."""
    return QuantizedBuffers(leaf, name) if isinstance(leaf, Quantized) else Buffers(leaf)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that starts at a multiple of 64 bytes."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(count + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + count].view(dtype).reshape(shape)


def read_index(leaf: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """`leaf[index]` on the host, from a shard of this process that has it."""
    for shard in leaf.addressable_shards:
        bounds = [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True)]
        leading = list(zip(index, bounds[: len(index)], strict=True))
        if all(start <= i < stop for i, (start, stop) in leading):
            return np.asarray(shard.data)[tuple(i - start for i, (start, _) in leading)]
    raise AssertionError(f"no shard of this process holds {index} of {leaf.shape}")
