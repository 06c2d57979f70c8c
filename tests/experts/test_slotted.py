"""Slots of equal number against the reference, behind the dispatch that makes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.structs import Routing
from moejax.experts.gated import init_experts
from moejax.experts.slotted import slotted
from moejax.experts.stage import reference

R, E, C, D, F = 2, 3, 2, 4, 5


@pytest.fixture(scope="module")
def arrived():
    """Rows of R senders, E experts and C slots; the second slot of expert 1 is empty."""
    experts = init_experts(jax.random.key(0), (E,), D, F, out_scale=1.0, dtype=jnp.float32)
    ids = np.tile(np.repeat(np.arange(E), C), R)
    x = np.random.default_rng(0).normal(size=(R * E * C, D)).astype(np.float32)
    empty = np.tile(np.arange(E * C) == 3, R)
    ids[empty], x[empty] = E, 0
    return jnp.asarray(x), routing(ids[:, None]), experts


def routing(ids):
    return Routing(
        topk_idx=jnp.asarray(ids, jnp.int32),
        topk_weights=jnp.ones(ids.shape),
        router_logits=jnp.zeros((0, E)),
    )


def test_values_gradients_and_counts_equal_the_reference(arrived):
    def run(stage, x, experts):
        y, _, counts = stage(x, arrived[1], experts, jnp.int32(0), None)
        return jnp.sum(y**3), (y, counts)

    x, _, experts = arrived
    grad = jax.value_and_grad(run, argnums=(1, 2), has_aux=True)
    got, want = grad(slotted(R), x, experts), grad(reference, x, experts)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert int(got[0][1][1].lookups) == E


def test_rows_that_are_not_slots_are_refused(arrived):
    x, chosen, experts = arrived
    with pytest.raises(InputError, match="12 rows with 1 choices are not slots of 5 senders"):
        slotted(5)(x, chosen, experts, jnp.int32(0), None)
    with pytest.raises(InputError, match="2 rows with 2 choices"):
        two = routing(np.array([[0, 1], [1, 2]]))
        slotted(1)(x[:2], two, experts, jnp.int32(0), None)
