"""Sums over copies against numpy, to the bit between copies; bytes that do not know E."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.aot.collectives import collectives
from moejax.aot.hlo import parse_hlo
from moejax.core.mesh import make_mesh
from moejax.dispatch.tie import sum_replica_gradients, tie_replicas
from moejax.placement.build import from_phys_to_log, identity

MESH = make_mesh(expert=4)
SLOTS = [0, 1, 2, 0, 3, 0, 1, 4]


def over_ranks(fn):
    return jax.jit(jax.shard_map(fn, mesh=MESH, in_specs=(P("expert"), P()), out_specs=P("expert")))


def test_copies_get_the_sum_and_the_others_stay():
    placement = from_phys_to_log(SLOTS, num_experts=5, ranks=4)
    rng = np.random.default_rng(0)
    grads = {
        "w": rng.normal(size=(8, 3, 2)).astype(np.float32),
        "b": rng.normal(size=8).astype(jnp.bfloat16),
    }
    got = over_ranks(partial(sum_replica_gradients, axis="expert"))(grads, placement)
    for name, leaf in grads.items():
        rows, out = np.asarray(leaf, np.float64), np.asarray(got[name])
        assert got[name].dtype == leaf.dtype
        for p, e in enumerate(SLOTS):
            copies = [q for q in range(8) if SLOTS[q] == e]
            want = rows[copies].sum(0)
            np.testing.assert_allclose(out[p].astype(np.float64), want, rtol=1e-2, atol=1e-2)
            np.testing.assert_array_equal(out[p], out[copies[0]])
            if len(copies) == 1:
                np.testing.assert_array_equal(out[p], leaf[p])
    np.testing.assert_allclose(np.asarray(got["w"])[0], grads["w"][[0, 3, 5]].sum(0), rtol=1e-6)


def test_tied_weights_are_themselves_and_their_gradient_the_sum():
    placement = from_phys_to_log(SLOTS, num_experts=5, ranks=1, twice_on_rank=True)
    weights = np.arange(8, dtype=np.float32)
    scale = weights**2

    @partial(jax.value_and_grad, has_aux=True)
    def run(weights, placement):
        tied = tie_replicas(None, placement, weights)
        return jnp.sum(tied * scale), tied

    (_, tied), grads = jax.jit(run)(weights, placement)
    np.testing.assert_array_equal(tied, weights)
    want = [sum(scale[q] for q in range(8) if SLOTS[q] == e) for e in SLOTS]
    np.testing.assert_array_equal(grads, want)


@pytest.mark.parametrize("num_experts, spare", [(8, 4), (16, 4), (16, 0)])
def test_bytes_are_those_of_the_spare_slots(num_experts, spare):
    slots = np.append(np.arange(num_experts), np.arange(spare))
    placement = from_phys_to_log(slots, num_experts=num_experts, ranks=4)
    assert spare or jax.tree.leaves(placement)[0].shape == identity(16).phys_to_log.shape
    shape = jax.ShapeDtypeStruct((len(slots), 6, 4), jnp.float32)
    run = over_ranks(partial(sum_replica_gradients, axis="expert"))
    text = run.lower(shape, placement).compile().as_text()
    assert text is not None
    found = [(one.kind, one.nbytes) for one in collectives(parse_hlo(text), MESH)]
    assert found == ([("all-reduce", spare * 6 * 4 * 4)] if spare else [])
