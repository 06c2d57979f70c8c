"""Rows times matrices of their own: values, bits, and no matrix copied out of the stack."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.each_row import matmul_each
from moejax.kernels.rows import to_bits
from tests.exact import exact_jit
from tests.kernels.cases import assert_close, normal

RUN = exact_jit(matmul_each)


@pytest.mark.parametrize("inner", [16, 24, 21, 17 * 16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_plain_products(key, inner, dtype):
    x, stack = normal(key, (4, inner), (5, inner, 18))
    stack, rows = stack.astype(dtype), jnp.asarray([3, 0, 3, 4], jnp.int32)
    got = RUN(x, stack, rows)
    want = np.einsum("na,nab->nb", np.asarray(x), np.asarray(stack[rows], np.float32))
    assert_close(got, want)
    np.testing.assert_array_equal(got, RUN(x, to_bits(stack), rows))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bits_do_not_depend_on_the_other_rows(key, dtype):
    x, stack = normal(key, (8, 64), (9, 64, 40), dtype=dtype)
    x, rows = x.astype(jnp.float32), jnp.asarray([3, 0, 3, 4, 8, 1, 1, 5], jnp.int32)
    together = np.asarray(RUN(x, stack, rows))
    for n in range(8):
        np.testing.assert_array_equal(RUN(x[n, None], stack, rows[n, None])[0], together[n])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint16])
def test_no_matrix_is_copied_out_of_the_stack(dtype):
    x = jax.ShapeDtypeStruct((3, 256), jnp.float32)
    stack = jax.ShapeDtypeStruct((29, 256, 256), dtype)
    ids = jax.ShapeDtypeStruct((6, 3), jnp.int32)

    @jax.jit
    def run(x, stack, ids):
        return jax.lax.fori_loop(
            0, ids[0, 0], lambda i, y: matmul_each(y, stack, ids[i]), x.astype(jnp.float32)
        )

    compiled = run.lower(x, stack, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 256 * 4
    assert not re.search(r"f32\[(\d+,)?256,256\]\S* (fusion|copy|gather)", compiled.as_text())
