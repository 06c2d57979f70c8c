"""Experts in column parts: the same sums, finer misses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.core.structs import Routing
from moejax.costmodel.miss import MissCosts
from moejax.experts.gated import init_experts
from moejax.experts.quantize import quantize_experts
from moejax.experts.stage import stacked
from moejax.offload.columns import by_columns, score_columns, split_columns, split_routing
from moejax.offload.stage import OffloadConfig, init_state, offloaded
from moejax.offload.store import to_host

L, E, D, F, K, T = 2, 4, 8, 12, 2, 3


@pytest.fixture(scope="module")
def experts():
    weights = init_experts(
        jax.random.key(0), (L, E), D, F, out_scale=1.0, dtype=jnp.float32, bias=True
    )
    return jax.tree.map(lambda leaf: leaf + 0.1, weights)


def routing():
    idx = jnp.array([[0, 3], [1, E], [3, 2]], jnp.int32)
    return Routing(
        topk_idx=idx,
        topk_weights=jnp.ones(idx.shape, jnp.float32),
        router_logits=jnp.zeros((T, E), jnp.float32),
    )


def test_parts_add_up_and_are_divided_between_link_and_host(experts):
    """12 parts are missing; at equal costs of link and host half of them move."""
    parts = 3
    costs = MissCosts(fetch_s=1.0, host_read_s=1.0, host_row_s=1e-6)
    cfg = OffloadConfig(num_slots=L, serve="divide", costs=costs, column_parts=parts)
    split = split_columns(experts, parts)

    @jax.jit
    def run(store, x, state):
        stage = by_columns(offloaded(store, cfg), parts)
        return stage(x, routing(), None, jnp.int32(1), state)

    x = jax.random.normal(jax.random.key(1), (T, D))
    store = to_host(split, make_mesh())
    y, _, counts = run(store, x, init_state(split, cfg))
    want, _, _ = stacked(experts)(x, routing(), None, jnp.int32(1), None)
    np.testing.assert_allclose(y, want, atol=2e-6 * float(jnp.abs(want).max()))
    wanted = 4 * parts
    assert (int(counts.lookups), int(counts.hits)) == (wanted, 0)
    assert (int(counts.demand_fetches), int(counts.host_computes)) == (6, 6)


def test_scores_of_parts(experts):
    def scorer(x, routing, layer, state):
        return jnp.sum(jax.nn.one_hot(routing.topk_idx, E), axis=1), state

    plain, _ = scorer(None, routing(), None, None)
    split, _ = score_columns(scorer, 2)(None, split_routing(routing(), 2), None, None)
    np.testing.assert_array_equal(split, np.repeat(plain, 2, axis=1))


def test_split_of_numpy_equals_split_of_jax(experts):
    ours = split_columns(jax.tree.map(np.asarray, experts), 4)
    jax.tree.map(np.testing.assert_array_equal, ours, split_columns(experts, 4))
    assert isinstance(ours.w_gate, np.ndarray) and ours.w_gate.shape == (L, E * 4, D, F // 4)
    part = 3 * 4 + 1  # part 1 of expert 3
    np.testing.assert_array_equal(ours.w_up[1, part], experts.w_up[1, 3, :, 3:6])
    np.testing.assert_array_equal(ours.w_down[1, part], experts.w_down[1, 3, 3:6])


def test_refusals(experts):
    with pytest.raises(InputError, match="5 column parts do not divide d_ff=12"):
        split_columns(experts, 5)
    with pytest.raises(InputError, match="column_parts=0"):
        OffloadConfig(num_slots=2, column_parts=0)
    plain = dataclasses.replace(experts, b_gate=None, b_up=None, b_down=None)
    with pytest.raises(InputError, match="quantised experts cannot be split"):
        split_columns(quantize_experts(plain, "int8"), 2)
