"""Expert stages against the oracle, values and gradients, for every shape of load."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.experts.stage import reference, resident, stacked
from tests.experts.cases import (
    PATTERNS,
    SMALL,
    D,
    E,
    K,
    T,
    experts_of,
    normal,
    routing_of,
    topk_ids,
)
from tests.kernels.cases import assert_close

L = 3


def run(stage):
    """jit of (x, routing, weights, cotangent) -> (outputs, counts, gradients wrt x, weights)."""

    def fn(x, routing, weights, ct):
        def outputs(x, weights):
            y, state, counts = stage(x, routing, weights, jnp.int32(0), None)
            assert state is None
            return y, counts

        y, vjp, counts = jax.vjp(outputs, x, weights, has_aux=True)
        return y, counts, vjp(ct)

    return jax.jit(fn)


RESIDENT, REFERENCE = run(resident), run(reference)


@pytest.fixture(scope="module")
def operands():
    return jnp.asarray(normal(1, T, D)), experts_of(2), jnp.asarray(normal(5, T, K, D))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_resident_equals_the_reference_in_value_and_gradient(pattern, operands):
    x, weights, ct = operands
    ids = topk_ids(pattern)
    got = RESIDENT(x, routing_of(ids), weights, ct)
    want = REFERENCE(x, routing_of(ids), weights, ct)
    assert_close((got[0], got[2]), (want[0], want[2]))
    # Padding yields zero rows; an expert nobody wants gets exactly no gradient.
    np.testing.assert_array_equal(got[0][ids == E], 0)
    idle = np.setdiff1d(np.arange(E), ids)
    for leaf in jax.tree.leaves(got[2][1]):
        np.testing.assert_array_equal(leaf[idle], 0)
    busy = np.setdiff1d(ids, [E])
    for counts in (got[1], want[1]):
        assert counts.lookups == counts.hits == len(busy)
        assert counts.waves == 1
        assert counts.demand_fetches == counts.prefetches == counts.prefetches_wasted == 0


def test_stacked_is_bitwise_resident_in_every_layer(operands):
    x, ids = operands[0][:SMALL], topk_ids("masked")[:SMALL]
    experts, routing = experts_of(6, L), routing_of(ids)
    one = jax.jit(lambda x, w: resident(x, routing, w, jnp.int32(0), None)[0])

    @jax.jit
    def all_layers(x, experts):
        stage = stacked(experts)

        def body(state, layer):
            y, state, counts = stage(x, routing, None, layer, state)
            return state, (y, counts)

        return jax.lax.scan(body, None, jnp.arange(L, dtype=jnp.int32))[1]

    got, counts = all_layers(x, experts)
    for layer in range(L):
        want = one(x, jax.tree.map(lambda leaf, layer=layer: leaf[layer], experts))
        np.testing.assert_array_equal(got[layer], want)
    assert not np.array_equal(got[0], got[1])
    np.testing.assert_array_equal(counts.lookups, [len(np.unique(ids[ids < E]))] * L)


def test_bfloat16_rows_stay_bfloat16(operands):
    x, weights = operands[0][:SMALL], operands[1]
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    routing = routing_of(topk_ids("spread")[:SMALL])
    run = jax.jit(lambda x, w: resident(x, routing, w, jnp.int32(0), None)[0])
    y, full = run(x.astype(jnp.bfloat16), half), run(x, weights)
    assert y.dtype == jnp.bfloat16
    assert_close(y, full, tolerance=0.03)


def test_weights_go_to_the_stage_that_wants_them(operands):
    x, weights, _ = operands
    routing, layer = routing_of(topk_ids("one")), jnp.int32(0)
    for stage in (resident, reference):
        with pytest.raises(AssertionError, match="wants the layer's experts"):
            stage(x, routing, None, layer, None)
    with pytest.raises(AssertionError, match="brings its own experts"):
        stacked(experts_of(0, 1))(x, routing, weights, layer, None)
