"""Global batches from the rows that a process holds."""

import itertools
import types

import numpy as np
import pytest

from moejax.core.mesh import make_mesh
from moejax.data.source import RandomWindows
from moejax.training.feed import batch_struct, feed, local_rows, place
from tests.training.helpers import text_bytes, tiny_train

CFG = tiny_train(batch_size=8)


def take(mesh, step, count):
    source = RandomWindows(data=text_bytes(), seed=0, batch_size=8, seq_len=CFG.seq_len)
    return list(itertools.islice(feed(source, CFG, mesh, step), count))


@pytest.mark.parametrize("axes", [{}, {"data": 2, "expert": 2}, {"data": 4, "model": 2}])
def test_the_batch_does_not_depend_on_the_mesh(axes):
    mesh = make_mesh(**axes)
    for alone, batch in zip(take(None, 3, 2), take(mesh, 3, 2), strict=True):
        np.testing.assert_array_equal(batch, alone)
        struct = batch_struct(CFG, mesh)
        want = struct.shape, struct.dtype, struct.sharding
        assert (batch.shape, batch.dtype, batch.sharding) == want
    shards = {shard.data.shape[0] for shard in batch.addressable_shards}
    assert shards == {8 // (mesh.shape["data"] * mesh.shape["expert"])}


class HalfOf:
    """The sharding of a process that holds every second device."""

    def __init__(self, sharding):
        self.sharding = sharding

    def addressable_devices_indices_map(self, shape):
        whole = self.sharding.devices_indices_map(shape)
        return {device: index for device, index in whole.items() if device.id % 2}


def test_a_process_reads_the_rows_of_its_devices():
    mesh = make_mesh(data=2, expert=2, model=2)
    struct = batch_struct(CFG, mesh)
    np.testing.assert_array_equal(local_rows(struct), np.arange(8))
    np.testing.assert_array_equal(local_rows(batch_struct(CFG, None)), np.arange(8))
    # Odd devices: the second of each pair along `model`, which holds what the first one holds.
    half = types.SimpleNamespace(shape=struct.shape, sharding=HalfOf(struct.sharding))
    np.testing.assert_array_equal(local_rows(half), np.arange(8))
    half.sharding = HalfOf(batch_struct(CFG, make_mesh(data=4, expert=2)).sharding)
    np.testing.assert_array_equal(local_rows(half), [1, 3, 5, 7])


def test_without_a_mesh_rows_pass_as_they_are():
    rows = np.zeros((8, CFG.seq_len + 1), np.int32)
    assert place(rows, batch_struct(CFG, None)) is rows
