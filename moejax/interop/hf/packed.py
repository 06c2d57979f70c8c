"""Quantised tensors as the arrays they stand for.

    fp8    block-scaled: `N` in float8 and `N_scale_inv`, one float32 per block (DeepSeek-V3,
           arXiv 2412.19437, section 3.3.2)
    mxfp4  `N_blocks`, two 4-bit floats per byte, and `N_scales`, a power of two per 32 values along
           the last axis (OCP microscaling formats 1.0); experts are kept transposed (gpt-oss)

Everything above this module sees plain tensors.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from moejax.core.errors import InputError, check
from moejax.core.safetensors import Stored, read

# Sign, two bits of exponent, one of mantissa.
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor of the model: its shape, the stored tensors it takes, and how to get it.

    `read(row)` gives the row along the first axis, or all of it for None.
    """

    shape: tuple[int, ...]
    uses: tuple[str, ...]
    read: Callable[[int | None], np.ndarray]


def unpacked(stored: dict[str, Stored], quantization: dict[str, Any] | None) -> dict[str, Tensor]:
    """The tensors of a model by name, whatever they are packed as.

    `quantization` is the checkpoint's `quantization_config`. Raises `InputError` for a method that
    is neither fp8 with blocks nor mxfp4, and for values without their scales.
    """
    wrong = f"config.json: quantization_config={quantization!r} is not an object"
    check(isinstance(quantization, dict | None), wrong)
    method = (quantization or {}).get("quant_method")
    if method is None:
        return {name: plain(name, tensor) for name, tensor in stored.items()}
    if method == "fp8":
        return _fp8(stored, quantization or {})
    if method == "mxfp4":
        return _mxfp4(stored)
    raise InputError(f"quantization method {method!r} is not supported; fp8 and mxfp4 are")


def plain(name: str, stored: Stored) -> Tensor:
    """A tensor stored as it is."""
    return Tensor(shape=stored.shape, uses=(name,), read=partial(read, stored))


def _fp8(stored: dict[str, Stored], quantization: dict[str, Any]) -> dict[str, Tensor]:
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2):
        raise InputError(f"fp8 without a weight_block_size of two numbers, got {block!r}")
    suffix = "_scale_inv"
    tensors = {}
    for name, values in stored.items():
        if name.endswith(suffix) and name.removesuffix(suffix) in stored:
            continue
        if values.dtype.itemsize > 1:
            tensors[name] = plain(name, values)
            continue
        scales = stored.get(name + suffix)
        if scales is None:
            raise InputError(f"{name} is {values.dtype} without {name}{suffix}")
        want = tuple(-(-size // b) for size, b in zip(values.shape, block, strict=True))
        check(scales.shape == want, f"{name}{suffix} has shape {scales.shape}, blocks want {want}")
        get = partial(_read_fp8, values, scales, tuple(block))
        tensors[name] = Tensor(shape=values.shape, uses=(name, name + suffix), read=get)
    return tensors


def _read_fp8(
    values: Stored, scales: Stored, block: tuple[int, int], row: int | None
) -> np.ndarray:
    assert row is None, "fp8 tensors are one expert each"
    array, scale = read(values).astype(np.float32), read(scales).astype(np.float32)
    for i in range(scale.shape[0]):
        rows = array[i * block[0] : (i + 1) * block[0]]
        rows *= np.repeat(scale[i], block[1])[None, : rows.shape[1]]
    return array


def _mxfp4(stored: dict[str, Stored]) -> dict[str, Tensor]:
    tensors = {}
    for name, values in stored.items():
        base = name.removesuffix("_blocks")
        if name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in stored:
            continue
        if base == name:
            tensors[name] = plain(name, values)
            continue
        scales = stored.get(f"{base}_scales")
        if scales is None:
            raise InputError(f"{name} is stored without {base}_scales")
        experts, rows, groups, half = values.shape
        check(
            scales.shape == (experts, rows, groups),
            f"{base}_scales has shape {scales.shape}, blocks want {(experts, rows, groups)}",
        )
        tensors[base] = Tensor(
            shape=(experts, groups * half * 2, rows),
            uses=(name, f"{base}_scales"),
            read=partial(_read_mxfp4, values, scales),
        )
    return tensors


def _read_mxfp4(values: Stored, scales: Stored, row: int | None) -> np.ndarray:
    if row is None:
        return np.stack([_read_mxfp4(values, scales, r) for r in range(values.shape[0])])
    packed, exponent = read(values, row), read(scales, row).astype(np.int32) - 127
    array = np.empty((*packed.shape, 2), np.float32)
    array[..., 0], array[..., 1] = _FP4[packed & 15], _FP4[packed >> 4]
    np.ldexp(array, exponent[..., None, None], out=array)
    return array.reshape(packed.shape[0], -1).T
