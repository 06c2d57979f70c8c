"""Packed tensors: fp8 in blocks by hand, MXFP4 against `transformers`."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moejax.core.errors import InputError
from moejax.core.safetensors import Writer
from moejax.interop.hf.packed import unpacked
from moejax.interop.hf.tensors import SINGLE, open_folder

FP8 = {"quant_method": "fp8", "weight_block_size": [4, 3]}
RNG = np.random.default_rng(0)


def write(folder, arrays):
    writer = Writer(folder / SINGLE, list(arrays))
    for name, array in arrays.items():
        writer.add(name, array)
    writer.close()
    return open_folder(folder)


def test_fp8_blocks_are_scaled_and_the_ragged_ones_too(tmp_path):
    values = RNG.normal(size=(6, 7)).astype(ml_dtypes.float8_e4m3fn)
    scales = RNG.uniform(0.5, 2, size=(2, 3)).astype(np.float32)
    norm = RNG.normal(size=(7,)).astype(np.float32)
    stored = write(tmp_path, {"w": values, "w_scale_inv": scales, "norm": norm})
    tensors = unpacked(stored, FP8)
    assert sorted(tensors) == ["norm", "w"]
    assert sorted({name for tensor in tensors.values() for name in tensor.uses}) == sorted(stored)
    got = tensors["w"].read(None)
    for i, j in np.ndindex(6, 7):
        assert got[i, j] == np.float32(values[i, j]) * scales[i // 4, j // 3]
    np.testing.assert_array_equal(tensors["norm"].read(None), norm)


def test_mxfp4_equals_transformers(tmp_path):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = RNG.integers(0, 256, (3, 5, 2, 16)).astype(np.uint8)
    scales = RNG.integers(120, 134, (3, 5, 2)).astype(np.uint8)
    stored = write(tmp_path, {"up_blocks": blocks, "up_scales": scales})
    tensors = unpacked(stored, {"quant_method": "mxfp4"})
    (tensor,) = tensors.values()
    assert tensor.shape == (3, 64, 5) and tensor.uses == ("up_blocks", "up_scales")
    want = convert_moe_packed_tensors(
        torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32
    )
    np.testing.assert_array_equal(tensor.read(None), want.numpy())
    np.testing.assert_array_equal(tensor.read(2), want[2].numpy())


@pytest.mark.parametrize(
    ("names", "quantization", "message"),
    [
        (["w"], FP8, "w is float8_e4m3fn without w_scale_inv"),
        (["w"], {"quant_method": "fp8"}, "fp8 without a weight_block_size of two numbers"),
        (["w", "w_scale_inv"], FP8, r"w_scale_inv has shape \(4, 4\), blocks want \(1, 2\)"),
        (["w"], {"quant_method": "gptq"}, "quantization method 'gptq' is not supported"),
    ],
)
def test_wrong_packing_is_refused(tmp_path, names, quantization, message):
    kinds = {"w": ml_dtypes.float8_e4m3fn, "w_scale_inv": np.float32}
    stored = write(tmp_path, {name: np.ones((4, 4), kinds[name]) for name in names})
    with pytest.raises(InputError, match=message):
        unpacked(stored, quantization)


def test_mxfp4_wants_scales(tmp_path):
    save_file({"a_blocks": np.zeros((1, 2, 1, 16), np.uint8)}, tmp_path / SINGLE)
    with pytest.raises(InputError, match="a_blocks is stored without a_scales"):
        unpacked(open_folder(tmp_path), {"quant_method": "mxfp4"})
