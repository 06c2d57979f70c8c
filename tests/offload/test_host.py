"""What the host computes: the rows of missing experts that are not moved, and no others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core.mesh import make_mesh
from moejax.core.structs import Routing
from moejax.experts.gated import init_experts
from moejax.experts.stage import stacked
from moejax.offload.host import pick_rows, run_on_host
from moejax.offload.policies import lru
from moejax.offload.slots import init_table, layer_slots
from moejax.offload.source import source_of
from moejax.offload.store import to_host
from moejax.offload.waves import plan_call, unpermute
from moejax.offload.work import sort_experts
from tests.exact import exact_jit

L, E, D, F, T = 2, 4, 8, 6, 5


def test_only_rows_of_unmoved_experts_come_from_the_host():
    experts = init_experts(jax.random.key(0), (L, E), D, F, out_scale=1.0, dtype=jnp.float32)
    store = to_host(experts, make_mesh())
    idx = jnp.array([[0, 1], [2, 1], [1, 2], [3, E], [1, 0]], jnp.int32)
    routing = Routing(
        topk_idx=idx,
        topk_weights=jnp.ones(idx.shape),
        router_logits=jnp.zeros((T, E)),
    )
    wanted, rows = jnp.ones((E,), bool), jnp.array([2, 4, 2, 1], jnp.int32)

    @exact_jit
    def run(store, experts, x):
        table = init_table(L, E, layer_slots(L, L))
        work = sort_experts(table, jnp.int32(1), wanted, jnp.zeros((E,), bool), rows)
        work = dataclasses.replace(work, num_moved=jnp.int32(2))
        call = plan_call(x, routing, work, source=source_of(store), policy=lru)
        mine = pick_rows(call, jnp.full_like(call.xs, 7.0), run_on_host(call))
        whole, _, _ = stacked(experts)(x, routing, None, jnp.int32(1), None)
        return work.order, unpermute(call, mine), whole

    x = jax.random.normal(jax.random.key(1), (T, D))
    order, mine, whole = run(store, experts, x)
    np.testing.assert_array_equal(order, [1, 0, 2, 3])  # most rows first, then by id
    on_host = np.isin(np.asarray(idx), [2, 3])
    np.testing.assert_array_equal(np.asarray(mine)[on_host], np.asarray(whole)[on_host])
    moved = np.isin(np.asarray(idx), [0, 1])
    assert (np.asarray(mine)[moved] == 7.0).all()
