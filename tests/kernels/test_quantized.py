"""Words of quantised values: unpacked independently, multiplied in place, refused where wrong."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.experts.quantize import quantize_matrix
from moejax.kernels import grouped_ffn as ffn
from moejax.kernels.few_rows import matmul_row
from moejax.kernels.quantized import (
    FORMATS,
    Quantized,
    decode,
    dequantize,
    dequantize_tree,
    is_quantized,
)
from moejax.kernels.rows import read_row
from tests.kernels.cases import assert_close, normal

R, A, B = 3, 48, 10


def stack_of(format, seed=0, rows=A, columns=B):
    """A stack of R quantised matrices."""
    weights = np.random.default_rng(seed).normal(size=(R, rows, columns))
    pairs = [quantize_matrix(matrix, format) for matrix in weights]
    q, scale = (jnp.asarray(np.stack(part)) for part in zip(*pairs, strict=True))
    return Quantized(q=q, scale=scale, format=format)


def by_hand(stack):
    """float32 [R, A, B], value by value as the module says."""
    words, scale = np.asarray(stack.q).view(np.uint32), np.asarray(stack.scale)
    bits = 4 if stack.format == "int4" else 8
    scale = scale.reshape(R, -1, B)
    per_word, group = 32 // bits, A // scale.shape[1]
    matrices = np.empty((R, A, B), np.float32)
    for a in range(A):
        g, inside = divmod(a, group)
        p, i = divmod(inside, group // per_word)
        raw = words[:, g * (group // per_word) + i] >> (bits * p) & (2**bits - 1)
        if stack.format == "fp8":
            value = raw.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        else:
            value = np.where(raw < 2 ** (bits - 1), raw.astype(np.int64), raw - 2.0**bits)
        matrices[:, a] = value.astype(np.float32) * scale[:, g]
    return matrices


@pytest.mark.parametrize("format", FORMATS)
def test_a_stack_is_read_and_multiplied_as_its_words_say(format):
    stack, want = stack_of(format), by_hand(stack_of(format))
    assert stack.shape == (R, A, B) and stack.ndim == 3 and stack.dtype == jnp.float32
    np.testing.assert_array_equal(dequantize(stack), want)
    read, multiply = jax.jit(read_row), jax.jit(matmul_row)
    for row in (0, R - 1):
        np.testing.assert_array_equal(read(stack, jnp.int32(row)), want[row])
        for rows in (3, 5):
            x = np.random.default_rng(rows).normal(size=(rows, A)).astype(np.float32)
            assert_close(multiply(x, stack, jnp.int32(row)), x @ want[row])


@pytest.mark.parametrize("format, rows", [("int8", 1), ("int4", 3), ("fp8", 1)])
def test_no_matrix_is_unpacked_as_a_whole(format, rows):
    """One loop of products of changing matrices holds less memory than one float32 matrix."""
    per_word, group = (8, 64) if format == "int4" else (4, 256)
    stack = Quantized(
        q=jax.ShapeDtypeStruct((29, 256 // per_word, 256), jnp.int32),
        scale=jax.ShapeDtypeStruct((29, 1, 256 // group * 256), jnp.float32),
        format=format,
    )
    x = jax.ShapeDtypeStruct((rows, 256), jnp.float32)
    ids = jax.ShapeDtypeStruct((6,), jnp.int32)

    @jax.jit
    def run(x, stack, ids):
        return jax.lax.fori_loop(0, ids[0], lambda i, y: matmul_row(y, stack, ids[i]), x)

    compiled = run.lower(x, stack, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 256 * 4
    assert not re.search(r"f32\[(1,)?256,256\]", compiled.as_text())


def test_every_e4m3_number_is_widened_exactly():
    codes = np.setdiff1d(np.arange(256, dtype=np.int32), [0x7F, 0xFF])  # those are NaN
    want = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for p in range(4):
        words = jnp.asarray(
            (codes.astype(np.uint32) << (8 * p)).view(np.int32) | (0x55 << 8 * (p ^ 1))
        )
        np.testing.assert_array_equal(decode(words, p, "fp8").view(jnp.int32), want.view(np.int32))


def test_trees_keep_what_is_not_quantised():
    stack = stack_of("int8")
    tree = {"a": stack, "b": jnp.ones((2,), jnp.bfloat16)}
    assert is_quantized(tree) and not is_quantized(tree["b"])
    got = dequantize_tree(tree, jnp.bfloat16)
    assert got["b"] is tree["b"] and not is_quantized(got)
    np.testing.assert_array_equal(got["a"], dequantize(stack).astype(jnp.bfloat16))


def test_gated_mlp_equals_that_of_the_matrices_stood_for_and_has_no_gradient():
    weights = ffn.GatedWeights(
        w_gate=stack_of("int8", 1, 8, 16),
        w_up=stack_of("int8", 2, 8, 16),
        w_down=stack_of("int8", 3, 16, 8),
    )
    (xs,) = normal(jax.random.key(0), (7, 8))
    sizes, rows = jnp.asarray([3, 0, 4], jnp.int32), jnp.asarray([2, 1, 0], jnp.int32)
    run = jax.jit(ffn.grouped_ffn, static_argnames="implementation")
    dense = dequantize_tree(weights, jnp.float32)
    want = run(xs, dense, sizes, group_rows=rows, implementation="reference")
    for implementation in ("blocked", "reference"):
        got = run(xs, weights, sizes, group_rows=rows, implementation=implementation)
        assert_close(got, want)
    with pytest.raises(InputError, match="quantised experts have no gradient"):
        jax.grad(lambda xs: ffn.grouped_ffn(xs, weights, sizes).sum())(xs)
