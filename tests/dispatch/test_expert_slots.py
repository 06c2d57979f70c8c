"""Slots over a mesh: every rank's tokens are a group, each equal to a dense loop over experts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.structs import Routing
from moejax.dispatch.expert_slots import expert_slots
from moejax.experts.stage import reference
from moejax.layers.slot_moe import SlotMoEConfig, SlotMoEParams, init_slot_moe, slot_moe
from moejax.routing.config import ExpertChoiceConfig, SoftConfig
from tests.dispatch.cases import layout
from tests.dispatch.gates import over_mesh, random_like, total_loss
from tests.kernels.cases import assert_close
from tests.routing.dense_slots import dense_slots

E, D, T, RANKS = 8, 6, 128, 8
CONFIGS = {
    "expert_choice": SlotMoEConfig(
        d_ff=4, router=ExpertChoiceConfig(num_experts=E, capacity_factor=1.0)
    ),
    "soft": SlotMoEConfig(d_ff=4, router=SoftConfig(num_experts=E, slots_per_expert=2)),
}
# Two slots per rank and expert. `empty_slots`: a rank of padding alone, another with one token.
MASKS = {
    "all": np.ones(T, bool),
    "padding": np.arange(T) % 3 != 1,
    "empty_slots": ~np.isin(np.arange(T), [*range(16), *range(17, 32), 127]),
}


@partial(jax.jit, static_argnames="cfg")
def dense(params, x, mask, cfg):
    """((loss, y), gradients), group by group."""

    def loss(params, x):
        groups, masks = x.reshape(RANKS, -1, D), mask.reshape(RANKS, -1)
        y = jax.vmap(lambda x, mask: dense_slots(params, x, mask, cfg.router))(groups, masks)
        y = y.reshape(T, D)
        return total_loss(y), y

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def slot_params(cfg: SlotMoEConfig) -> SlotMoEParams:
    init = partial(init_slot_moe, cfg=cfg, d_model=D, out_scale=1.0, dtype=jnp.float32)
    params = random_like(jax.eval_shape(init, jax.random.key(0)))
    # Sharp choices: with weak ones all tokens look alike.
    router = jax.tree.map(lambda leaf: 4.0 * leaf, params.router)
    return params.replace(router=router)


@pytest.mark.parametrize(
    ("gate", "shape", "axis_type", "lowering"),
    [
        ("expert_choice", (1, 8), "auto", "native"),
        ("expert_choice", (2, 4), "explicit", "shifted"),
        ("soft", (1, 8), "explicit", "shifted"),
        ("soft", (2, 4), "auto", "native"),
    ],
)
def test_groups_equal_the_dense_loop(gate, shape, axis_type, lowering):
    cfg, where = CONFIGS[gate], layout(*shape, axis_type=axis_type)
    stage = expert_slots(reference, num_experts=E, token_axes=where.token_axes, lowering=lowering)
    params = slot_params(cfg)
    run = over_mesh(slot_moe, cfg, stage, where, params)
    x, counts = np.random.default_rng(1).normal(size=(T, D)).astype(np.float32), []
    for name, mask in MASKS.items():
        (got, (y, metrics)), grads = run(params, x, mask)
        (want, want_y), want_grads = dense(params, x, mask, cfg)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        assert_close((y, grads), jax.device_get((want_y, want_grads)))
        idle = np.all(np.asarray(want_y) == 0, axis=1)  # served by no expert
        assert idle[~mask].all()
        assert metrics.assignments_dropped == (idle & mask).sum()
        if gate == "soft":
            filled = 2 * np.any(mask.reshape(RANKS, -1), axis=1).sum()
        else:
            filled = np.minimum(mask.reshape(RANKS, -1).sum(1), 2).sum()
        np.testing.assert_array_equal(metrics.expert_load, np.full(E, filled))
        assert (filled < 2 * RANKS) == (name == "empty_slots")
        counts.append(int(metrics.assignments_dropped))
    assert (max(counts) > 0) == (gate == "expert_choice")


def test_wrong_input():
    with pytest.raises(InputError, match="lowering='fast' is not one of"):
        expert_slots(num_experts=E, lowering="fast")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(InputError, match="slots without an axis serve tokens of one rank"):
        expert_slots(num_experts=E, axis=None)
    stage = expert_slots(num_experts=E, axis=None, token_axes=())
    x, params = np.ones((T, D), np.float32), slot_params(CONFIGS["soft"])
    idx, weights = np.zeros((T, 1), np.int32), np.ones((T, 1), np.float32)
    routing = Routing(topk_idx=idx, topk_weights=weights, router_logits=weights)
    with pytest.raises(InputError, match="dispatch of slots wants a slot routing, got a Routing"):
        stage(x, routing, params.experts, jnp.int32(0), None)
