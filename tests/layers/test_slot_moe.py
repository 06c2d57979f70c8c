"""The slot-choice layer on one device against the dense oracle: rows, shared expert, metrics."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.experts.gated import gated_mlp
from moejax.layers.parallel import Parallel
from moejax.layers.slot_moe import SlotMoEConfig, init_slot_moe, slot_moe
from moejax.models.config import LayerGroup
from moejax.routing.config import ExpertChoiceConfig, SoftConfig
from tests.kernels.cases import assert_close
from tests.routing.dense_slots import dense_slots

T, D, E = 10, 6, 4
MASK = np.arange(T) != 3
CONFIGS = {
    "expert_choice": SlotMoEConfig(
        d_ff=5, shared_d_ff=3, router=ExpertChoiceConfig(num_experts=E, capacity_factor=0.5)
    ),
    "soft": SlotMoEConfig(d_ff=5, router=SoftConfig(num_experts=E, slots_per_expert=2)),
}


@partial(jax.jit, static_argnames="cfg")
def both(x, mask, cfg):
    """The layer (resident experts) and the oracle, on the same random weights."""
    params = init_slot_moe(jax.random.key(0), D, cfg, out_scale=1.0, dtype=jnp.float32)
    want = dense_slots(params, x, mask, cfg.router)
    shared = 0 * x if params.shared is None else gated_mlp(params.shared, x)
    y, routing, state, metrics = slot_moe(params, x, cfg, mask=mask)
    return y, want, shared, routing, state, metrics


@pytest.mark.parametrize("gate", CONFIGS)
def test_one_device(gate):
    x = np.random.default_rng(0).normal(size=(T, D)).astype(np.float32)
    y, want, shared, routing, state, metrics = both(x, MASK, CONFIGS[gate])
    assert_close(y, want + shared)
    np.testing.assert_array_equal(y[3], shared[3])
    slots = 1 if gate == "expert_choice" else 2
    np.testing.assert_array_equal(metrics.expert_load, np.full(E, slots))
    assert state is None and metrics.lookups == metrics.hits == E and metrics.waves == 1
    np.testing.assert_allclose(metrics.load_balancing_loss, 1.0, rtol=1e-6)
    logits = np.asarray(routing.router_logits, np.float64)[MASK].reshape(T - 1, -1)
    want_z = np.mean(np.log(np.exp(logits).sum(1)) ** 2)
    np.testing.assert_allclose(metrics.router_z_loss, want_z, rtol=1e-5)
    idle = MASK & np.all(np.asarray(want) == 0, axis=1)
    assert metrics.assignments_dropped == idle.sum()
    assert idle.any() == (gate == "expert_choice")
    y, _, shared, _, _, metrics = both(x, np.zeros(T, bool), CONFIGS[gate])
    np.testing.assert_array_equal(y, shared)  # empty slots want no expert
    assert metrics.lookups == metrics.assignments_dropped == metrics.expert_load.sum() == 0


@pytest.mark.parametrize("gate", CONFIGS)
def test_bfloat16_activations_and_a_float32_router(gate):
    cfg = CONFIGS[gate]

    def traced(x):
        params = init_slot_moe(jax.random.key(0), D, cfg, out_scale=1.0, dtype=x.dtype)
        y, routing, _, metrics = slot_moe(params, x, cfg)
        return params.experts, y, routing.router_logits, metrics.load_balancing_loss

    x = jax.ShapeDtypeStruct((T, D), jnp.bfloat16)
    experts, y, logits, loss = jax.eval_shape(traced, x)
    assert experts.w_up.dtype == y.dtype == jnp.bfloat16 and y.shape == (T, D)
    assert logits.dtype == loss.dtype == jnp.float32


def test_a_decoder_refuses_gates_that_look_ahead():
    for gate, cfg in CONFIGS.items():
        with pytest.raises(InputError, match=f"a decoder wants a causal gate, got '{gate}'"):
            LayerGroup(num_layers=1, moe=cfg)  # pyrefly: ignore[bad-argument-type]


def test_impossible_configs_are_refused():
    router = CONFIGS["soft"].router
    assert hash(dataclasses.replace(CONFIGS["soft"], d_ff=6)) != hash(CONFIGS["soft"])
    with pytest.raises(InputError, match="d_ff=0 must be at least 1"):
        SlotMoEConfig(d_ff=0, router=router)
    with pytest.raises(InputError, match="shared_d_ff=-1 must not be negative"):
        SlotMoEConfig(d_ff=4, shared_d_ff=-1, router=router)
    with pytest.raises(InputError, match="mesh axes .* want a stage, such as expert_slots"):
        slot_moe(None, None, CONFIGS["soft"], parallel=Parallel(token_axes=("expert",)))
