"""Experts over a mesh axis, every token on every rank: exactly the single-device result."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.mesh import make_mesh
from moejax.experts.shard import first_expert, local_routing, sum_ranks
from moejax.experts.stage import resident, resident_counts, stacked
from moejax.kernels.permute import sort_by_group
from tests.experts.cases import SMALL, D, E, K, T, experts_of, normal, routing_of, topk_ids


@pytest.fixture(scope="module")
def operands():
    return jnp.asarray(normal(4, SMALL, D)), experts_of(5, 2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_stages_are_bitwise_the_single_device(ranks, operands):
    x, experts = operands
    mesh = make_mesh(expert=ranks)
    layer = jnp.int32(1)

    @jax.jit
    @partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(), P(None, "expert")), out_specs=(P(), P(), P())
    )
    def sharded(x, routing, experts):
        local = experts.w_gate.shape[1]
        assert local == E // ranks
        y, _, counts = stacked(experts, axis="expert")(x, routing, None, layer, None)
        mine = local_routing(routing, "expert", local)
        own = resident(x, mine, jax.tree.map(lambda leaf: leaf[1], experts), layer, None)[0]
        return y, sum_ranks(own, "expert"), counts

    @jax.jit
    def single(x, routing, experts):
        return resident(x, routing, jax.tree.map(lambda leaf: leaf[1], experts), layer, None)

    for pattern in ("masked", "one"):
        routing = routing_of(topk_ids(pattern)[:SMALL])
        want, _, whole = single(x, routing, experts)
        y, own, counts = sharded(x, routing, experts)
        np.testing.assert_array_equal(y, want)
        np.testing.assert_array_equal(own, want)
        assert counts.lookups == whole.lookups == counts.hits
        assert counts.demand_fetches == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_local_routings_partition_the_assignments(ranks):
    mesh, local = make_mesh(expert=ranks), E // ranks
    ids = topk_ids("masked")
    routing = routing_of(ids)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P("expert"))
    def per_rank(routing):
        mine = local_routing(routing, "expert", local)
        first = jnp.reshape(first_expert("expert", local), (1,))
        return mine.topk_idx[None], mine.topk_weights[None], first

    local_ids, weights, first = per_rank(routing)
    assert first.tolist() == [rank * local for rank in range(ranks)]
    for rank in range(ranks):
        inside = (ids >= rank * local) & (ids < (rank + 1) * local)
        np.testing.assert_array_equal(local_ids[rank], np.where(inside, ids - rank * local, local))
        np.testing.assert_array_equal(weights[rank], routing.topk_weights)
    # Every assignment has one rank, padding none.
    np.testing.assert_array_equal((np.asarray(local_ids) < local).sum(0), ids < E)


def test_without_an_axis_nothing_changes():
    routing = routing_of(topk_ids("masked"))
    assert local_routing(routing, None, E) is routing
    assert first_expert(None, E) == 0
    sizes = sort_by_group(routing.topk_idx, E).group_sizes
    counts = resident_counts(sizes)
    assert sum_ranks(counts, None) is counts
    assert sizes.sum() == (T - 3) * K
