"""Parts of a program that the host runs see operands of both memories as one."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core.host_compute import on_host
from moejax.core.memory import host_sharding
from moejax.core.mesh import make_mesh


def test_host_matrices_meet_device_rows():
    mesh = make_mesh()
    stack = jax.device_put(jnp.arange(24.0).reshape(4, 2, 3), host_sharding(mesh))
    rows = jnp.array([[1.0, 2.0], [3.0, 4.0]])

    def pick(stack, rows, index):
        return {"y": rows @ jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)}

    program = jax.jit(lambda *operands: on_host(pick)(*operands)["y"] + 1)
    got = program(stack, rows, jnp.int32(2))
    np.testing.assert_array_equal(got, rows @ np.asarray(stack)[2] + 1)
    assert "_xla_compute_type" in program.lower(stack, rows, jnp.int32(2)).as_text()
