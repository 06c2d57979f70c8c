"""Few rows times a matrix of a stack, without copying the matrix."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.few_rows import matmul_row
from moejax.kernels.rows import to_bits
from tests.kernels.cases import assert_close, normal


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("inner", [16, 21])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_a_plain_product(key, rows, inner, dtype):
    x, stack = normal(key, (rows, inner), (5, inner, 18))
    stack = stack.astype(dtype)
    run = jax.jit(matmul_row)
    for row in (0, 4):
        got = run(x, stack, jnp.int32(row))
        assert_close(got, np.asarray(x) @ np.asarray(stack[row], np.float32))
        np.testing.assert_array_equal(got, run(x, to_bits(stack), jnp.int32(row)))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint16])
def test_no_matrix_is_copied_out_of_the_stack(rows, dtype):
    """One loop of products of changing matrices holds less memory than one matrix."""
    x = jax.ShapeDtypeStruct((rows, 256), jnp.float32)
    stack = jax.ShapeDtypeStruct((29, 256, 256), dtype)
    ids = jax.ShapeDtypeStruct((6,), jnp.int32)

    @jax.jit
    def run(x, stack, ids):
        return jax.lax.fori_loop(
            0, ids[0], lambda i, y: matmul_row(y, stack, ids[i]), x.astype(jnp.float32)
        )

    compiled = run.lower(x, stack, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 256 * 4
    assert not re.search(r"f32\[(1,)?256,256\]", compiled.as_text())


def test_under_vmap(key):
    x, stack = normal(key, (4, 1, 16), (5, 16, 18))
    ids = jnp.asarray([3, 0, 3, 1], jnp.int32)
    got = jax.vmap(functools.partial(matmul_row), (0, None, 0))(x, stack, ids)
    assert_close(got, jnp.einsum("mra,mab->mrb", x, stack[ids]))
