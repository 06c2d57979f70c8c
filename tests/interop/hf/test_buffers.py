"""Arrays put together on the host: sharded, cast, in the memory that was asked for, uncopied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.memory import device_sharding, host_sharding
from moejax.core.mesh import make_mesh
from moejax.interop.hf.buffers import Buffers, aligned

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


def test_aligned():
    for size in (1, 7, 100):
        array = aligned((size, 3), np.dtype(np.float32))
        assert array.ctypes.data % 64 == 0 and array.shape == (size, 3)
