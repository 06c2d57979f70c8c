"""Memory kinds: placing, inspecting and fetching rows of host trees."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.memory import device_sharding, fetch_rows, host_sharding, memory_kinds, nbytes
from moejax.core.mesh import make_mesh


@pytest.fixture
def tree():
    a = jnp.arange(24.0).reshape(6, 2, 2)
    return {"a": a, "b": jnp.arange(12, dtype=jnp.int8).reshape(6, 2)}


def test_trees_are_placed_in_the_memory_they_are_sent_to(tree):
    mesh = make_mesh(expert=2)
    host = jax.device_put(tree, host_sharding(mesh, P("expert")))
    assert memory_kinds(host) == {"pinned_host"}
    assert host["a"].sharding.shard_shape(host["a"].shape) == (3, 2, 2)
    back = jax.device_put(host, device_sharding(mesh))
    assert memory_kinds(back) == {"device"}
    assert memory_kinds({"x": host["a"], "y": back["a"]}) == {"pinned_host", "device"}
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_nbytes_counts_arrays_and_shapes(tree):
    assert nbytes(tree) == 24 * 4 + 12
    assert nbytes(jax.eval_shape(lambda: tree)) == 24 * 4 + 12
    assert nbytes(jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)) == 30
    assert nbytes({}) == 0


def test_fetch_rows_reads_the_routed_row_of_every_leaf(tree):
    store = jax.device_put(tree, host_sharding(make_mesh()))

    @partial(jax.jit, out_shardings=device_sharding(make_mesh()))
    def fetch(store, scores):
        return fetch_rows(store, jnp.argmax(scores).astype(jnp.int32))

    for row in (0, 3, 5):
        got = fetch(store, jax.nn.one_hot(row, 6))
        assert memory_kinds(got) == {"device"}
        jax.tree.map(
            lambda leaf, full, row=row: np.testing.assert_array_equal(leaf, full[row]), got, tree
        )


def test_fetch_rows_moves_one_row_not_the_store(tree):
    store = jax.device_put(tree, host_sharding(make_mesh()))
    jaxpr = str(jax.make_jaxpr(fetch_rows)(store, jnp.int32(2)))
    moved = [line for line in jaxpr.splitlines() if "device_put" in line]
    assert len(moved) == 2
    assert "f32[1,2,2]" in moved[0] and "i8[1,2]" in moved[1]
