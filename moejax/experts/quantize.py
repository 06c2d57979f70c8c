"""Experts to few bits per weight, made once, where they lie; see `kernels.quantized` for the form.

    int8  one scale per column
    int4  one per column and group of about 64 rows
    fp8   one per block of about 128 x 128, as DeepSeek-V3 stores them (arXiv 2412.19437, section
          3.3.2), repeated for every column of the block: 3 % more bytes, and full rows of scales,
          which is what TPU transfers move

Whole numbers have one more step below zero than above. The value of largest magnitude, of either
sign, becomes that lowest step, hence scales of both signs: 12 % less error in int4 than with steps
-7 .. 7, and what was quantised once comes back bit for bit when it is quantised again. In fp8 the
values come back, and scales within a unit in the last place.

Group sizes divide their dim: of its divisors the nearest to 64 or 128.

NumPy, one matrix at a time: weights in host memory are quantised without passing the device, and
need room for one matrix in float32 beside the result.

Axis letters:
    L  MoE layers    E  experts    A, B  dims of a matrix    G  rows of a group    H  columns of one
    P  values of a word
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core.errors import InputError, check
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.quantized import FORMATS, Format, Quantized, values_per_word

_FP8_MAX = 448.0  # of float8_e4m3fn
_MATRICES = ("w_gate", "w_up", "w_down")


def quantize_experts(experts: GatedWeights, format: Format) -> GatedWeights:
    """The experts [L, E, ...] with `Quantized` matrices, in the same memory of the same devices.

    Biases stay. Sharding over the leading axes is kept. Raises `InputError` for an unknown format,
    dims that no word divides, weights that are not finite, or matrices that are cut over devices.
    Cost: 2 ns per weight on one core, 12 in fp8, beside the first touch of the memory that the
    result takes; and the bytes of both until the caller drops `experts`.
    """
    matrices: Any = {
        name: _quantize_stack(getattr(experts, name), format, name) for name in _MATRICES
    }
    return dataclasses.replace(experts, **matrices)


def abstract_quantized(experts: GatedWeights, format: Format) -> GatedWeights:
    """What `quantize_experts` returns for `ShapeDtypeStruct`s, shardings kept: to compile or load.

    Raises `InputError` as that does.
    """

    def abstract(leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=leaf.sharding)

    def matrix(name: str) -> Quantized:
        leaf = getattr(experts, name)
        words, scales = _stored_shapes(leaf.shape, format, name)
        leaves: Any = {"q": abstract(leaf, words, jnp.int32)}
        leaves["scale"] = abstract(leaf, scales, jnp.float32)
        return Quantized(**leaves, format=format)

    matrices: Any = {name: matrix(name) for name in _MATRICES}
    return dataclasses.replace(experts, **matrices)


def quantize_matrix(
    matrix: np.ndarray, format: Format, name: str = "matrix"
) -> tuple[np.ndarray, np.ndarray]:
    """Words int32 [A / P, B] and scales float32 [1, A / G * B] of one matrix [A, B].

    `name` is for the `InputError`s that `quantize_experts` lists.
    """
    words, scales = _stored_shapes(matrix.shape, format, name)
    columns = matrix.shape[1]
    matrix = np.ascontiguousarray(matrix, np.float32)
    grouped = matrix.reshape(scales[1] // columns, -1, columns)  # [A / G, G, B]
    scale = _scales(grouped, format)
    wrong = int((~np.isfinite(scale)).sum())
    check(
        wrong == 0, f"{name}: {wrong} of {scale.size} groups of weights hold NaN or infinite values"
    )
    q = _pack(_values(grouped, scale, format), values_per_word(format))
    return q.reshape(words), scale.reshape(scales)


def _scales(grouped: np.ndarray, format: Format) -> np.ndarray:
    """Scales [A / G, B] of weights [A / G, G, B]; those of fp8 are equal over blocks of columns."""
    lowest, highest = grouped.min(axis=1), grouped.max(axis=1)
    if format != "fp8":
        extreme = np.where(-lowest > highest, lowest, highest)
        return extreme / np.float32(_lowest(format))
    groups, columns = lowest.shape
    block = _divisor_near(columns, 128, 1)
    largest = np.maximum(-lowest, highest).reshape(groups, -1, block).max(axis=2)
    return np.repeat(largest / np.float32(_FP8_MAX), block, axis=1)


def _values(grouped: np.ndarray, scale: np.ndarray, format: Format) -> np.ndarray:
    """The bits of `grouped / scale` in `format`, uint8 [A / G, G, B]."""
    steps = grouped / np.where(scale == 0, np.float32(1), scale)[:, None]
    if format == "fp8":
        return steps.astype(jnp.float8_e4m3fn).view(np.uint8)
    lowest = _lowest(format)
    np.clip(np.rint(steps, out=steps), lowest, -lowest - 1, out=steps)
    return steps.astype(np.int8).view(np.uint8) & np.uint8(-2 * lowest - 1)


def _lowest(format: Format) -> int:
    """The lowest step of a format of whole numbers: -128 or -8."""
    return -(2 ** (32 // values_per_word(format) - 1))


def _pack(values: np.ndarray, per_word: int) -> np.ndarray:
    """Values uint8 [A / G, G, B] below 2 ** (32 / P) to words int32 [A / G, G / P, B]."""
    groups, _, columns = values.shape
    planes = values.reshape(groups, per_word, -1, columns)
    words = np.zeros((groups, planes.shape[2], columns), np.uint32)
    for p in range(per_word):
        words |= np.left_shift(planes[:, p], np.uint32(p * 32 // per_word), dtype=np.uint32)
    return words.view(np.int32)


def _quantize_stack(leaf: jax.Array, format: Format, name: str) -> Quantized:
    """`quantize_matrix` of all matrices of an array [..., A, B], shard by shard."""
    words, scales = _stored_shapes(leaf.shape, format, name)
    done: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    shards = []
    for shard in leaf.addressable_shards:
        check(
            shard.data.shape[-2:] == leaf.shape[-2:],
            f"{name}: matrices of shape {leaf.shape[-2:]} are cut over devices to "
            f"{shard.data.shape[-2:]}; they cannot be quantised",
        )
        index = str(shard.index)  # replicas have the same
        if index not in done:
            done[index] = _quantize_array(np.asarray(shard.data), format, name)
        place = jax.sharding.SingleDeviceSharding(
            shard.device, memory_kind=leaf.sharding.memory_kind
        )
        shards.append(jax.device_put(done[index], place))

    def join(shape: tuple[int, ...], which: int) -> jax.Array:
        parts = [both[which] for both in shards]
        return jax.make_array_from_single_device_arrays(shape, leaf.sharding, parts)

    return Quantized(q=join(words, 0), scale=join(scales, 1), format=format)


def _quantize_array(array: np.ndarray, format: Format, name: str) -> tuple[np.ndarray, np.ndarray]:
    leading = array.shape[:-2]
    words, scales = _stored_shapes(array.shape, format, name)
    q, scale = np.empty(words, np.int32), np.empty(scales, np.float32)
    for index in np.ndindex(*leading):
        q[index], scale[index] = quantize_matrix(array[index], format, f"{name}{list(index)}")
    return q, scale


def _stored_shapes(
    shape: tuple[int, ...], format: Format, name: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `Quantized.q` and `.scale` for matrices of `shape` [..., A, B]."""
    if format not in FORMATS:
        raise InputError(f"expert format {format!r} is not one of {', '.join(FORMATS)}")
    *leading, rows, columns = shape
    per_word = values_per_word(format)
    check(
        rows % per_word == 0,
        f"{name}: {rows} rows are not a multiple of {per_word}, the {format} values of a word",
    )
    near = {"int8": rows, "int4": 64, "fp8": 128}[format]
    group = _divisor_near(rows, near, per_word)
    return (*leading, rows // per_word, columns), (*leading, 1, rows // group * columns)


def _divisor_near(size: int, near: int, multiple: int) -> int:
    """The divisor of `size` nearest to `near` in ratio, of those that `multiple` divides."""
    divisors = [d for d in range(multiple, size + 1, multiple) if size % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / near)))
