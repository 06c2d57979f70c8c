"""Arrays put together on the host: sharded, cast, in the memory that was asked for, uncopied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.errors import InputError
from moejax.core.memory import device_sharding, host_sharding
from moejax.core.mesh import make_mesh
from moejax.experts.quantize import abstract_quantized, quantize_matrix
from moejax.interop.hf.buffers import Buffers, aligned, make_buffers
from moejax.kernels.grouped_ffn import GatedWeights

SHAPE = (3, 4, 2, 5)


@pytest.mark.parametrize("place", [device_sharding, host_sharding])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_piece_lands_in_its_shard(place, ranks):
    sharding = place(make_mesh(data=2, expert=ranks), P(None, "expert"))
    buffers = Buffers(jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16, sharding=sharding))
    want = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    moved = sum(buffers.put((i, e), want[i, e]) for i, e in np.ndindex(3, 4))
    got = buffers.finish()
    assert moved == got.nbytes and got.dtype == jnp.bfloat16
    assert got.sharding == sharding and got.sharding.memory_kind == sharding.memory_kind
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)


def test_cpu_memory_is_taken_as_it_is():
    sharding = host_sharding(make_mesh())
    buffers = Buffers(jax.ShapeDtypeStruct((64,), jnp.float32, sharding=sharding))
    (array,) = buffers._arrays.values()
    buffers.put((), np.ones(64))
    (shard,) = buffers.finish().addressable_shards
    assert shard.data.unsafe_buffer_pointer() == array.ctypes.data


@pytest.fixture(scope="module")
def quantized():
    """The abstract int4 twin of matrices [2, 4, 16, 6], two experts on each of two ranks."""
    leaf = jax.ShapeDtypeStruct(
        (2, 4, 16, 6), jnp.bfloat16, sharding=host_sharding(make_mesh(expert=2), P(None, "expert"))
    )
    return abstract_quantized(GatedWeights(w_gate=leaf, w_up=leaf, w_down=leaf), "int4").w_up


def test_matrices_are_quantised_as_they_come(quantized):
    want = np.random.default_rng(0).normal(size=quantized.shape).astype(np.float32)
    buffers = make_buffers("experts.w_up", quantized)
    moved = sum(buffers.put((i, e), want[i, e].T.copy().T) for i, e in np.ndindex(2, 4))
    got = buffers.finish()
    assert moved == got.q.nbytes + got.scale.nbytes
    assert (got.q.sharding, got.scale.sharding) == (quantized.q.sharding,) * 2
    for i, e in np.ndindex(2, 4):
        q, scale = quantize_matrix(want[i, e], "int4")
        np.testing.assert_array_equal(np.asarray(got.q)[i, e], q)
        np.testing.assert_array_equal(np.asarray(got.scale)[i, e], scale)


def test_a_matrix_that_cannot_be_quantised_is_named(quantized):
    matrix = np.ones((16, 6), np.float32)
    matrix[3, 5] = np.nan
    with pytest.raises(
        InputError, match=r"^experts.w_up\[1, 2\]: 1 of 6 groups of weights hold NaN"
    ):
        make_buffers("experts.w_up", quantized).put((1, 2), matrix)


def test_aligned():
    for size in (1, 7, 100):
        array = aligned((size, 3), np.dtype(np.float32))
        assert array.ctypes.data % 64 == 0 and array.shape == (size, 3)
