"""Preloading fills the cache with what was asked for."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.experts.gated import init_experts
from moejax.offload.preload import preload
from moejax.offload.slots import init_cache, layer_slots
from moejax.offload.source import source_of


def test_preload_fills_quotas_and_keeps_the_newest(key):
    store = init_experts(key, (2, 4), 8, 4, out_scale=1.0, dtype=jnp.float32)
    cache = init_cache(store, layer_slots(4, 2))
    fill = jax.jit(preload)
    cache = fill(cache, source_of(store), jnp.array([-1, 1, 5, 1, 3, 6, 8, -1], jnp.int32))
    held, w_down = np.asarray(cache.table.granule_of), store.w_down.reshape(8, 4, 8)
    assert sorted(held.tolist()) == [1, 3, 5, 6]
    for slot, granule in enumerate(held):
        np.testing.assert_array_equal(cache.rows.w_down[slot], w_down[granule])
        assert int(cache.table.slot_of[granule]) == slot
        assert int(cache.table.slot_layer[slot]) == granule // 4
