"""A product with a weight of a stack: the plain product, and on CPU with few rows no copy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.in_stack import InStack, linear
from tests.kernels.cases import assert_close, normal


@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_product_with_the_row(key, rows, dtype):
    x, stack = normal(key, (rows, 1, 4, 8), (3, 4, 8, 2, 5), dtype=dtype)
    got = jax.jit(lambda x, s, r: linear(x, InStack(stack=s, row=r), 2))(x, stack, jnp.int32(2))
    want = np.einsum("rsab,abcd->rscd", *(np.asarray(a, np.float32) for a in (x, stack[2])))
    assert got.dtype == dtype and got.shape == want.shape
    assert_close(got.astype(jnp.float32), want.astype(dtype).astype(np.float32))
    assert_close(linear(x, stack[2], 2).astype(jnp.float32), got.astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows, copies", [(4, False), (5, True)])
def test_few_rows_read_the_stack_in_place(dtype, rows, copies):
    x = jax.ShapeDtypeStruct((rows, 256), dtype)
    stack = jax.ShapeDtypeStruct((29, 256, 256), dtype)

    @jax.jit
    def run(x, stack):
        return jax.lax.fori_loop(0, 29, lambda i, x: linear(x, InStack(stack=stack, row=i)), x)

    compiled = run.lower(x, stack).compile()
    copied = re.search(r"f32\[(1,)?256,256\]\S* (fusion|copy|dynamic-slice)", compiled.as_text())
    assert bool(copied) == copies
    small = compiled.memory_analysis().temp_size_in_bytes < 256 * 256 * 4
    assert small != copies
