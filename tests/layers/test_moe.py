"""The mixture-of-experts layer against a sum over experts in plain numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.experts.gated import gated_mlp
from moejax.experts.stage import StageCounts, reference, resident
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.layers.moe import MoEConfig, MoEParams, init_moe, moe
from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams, route
from tests.kernels.cases import assert_close

T, D, F, E, K = 4, 8, 6, 8, 2
CFG = MoEConfig(
    d_ff=F,
    shared_d_ff=5,
    router=RouterConfig(num_experts=E, top_k=K, renormalize=False, scaling_factor=2.0),
)
MOE = jax.jit(moe, static_argnames=("cfg", "stage"))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gated(seed, *leading, hidden):
    return GatedWeights(
        w_gate=normal(seed, *leading, D, hidden) * D**-0.5,
        w_up=normal(seed + 1, *leading, D, hidden) * D**-0.5,
        w_down=normal(seed + 2, *leading, hidden, D) * hidden**-0.5,
    )


@pytest.fixture(scope="module")
def params():
    return MoEParams(
        router=RouterParams(w_router=normal(0, D, E)),
        experts=gated(1, E, hidden=F),
        shared=gated(4, hidden=CFG.shared_d_ff),
    )


@pytest.fixture(scope="module")
def x():
    return normal(9, T, D)


MASK = jnp.asarray([True, False, True, True])


def test_equals_the_sum_over_experts_plus_the_shared_one(params, x):
    y, routing, state, _ = MOE(params, x, CFG, mask=MASK)
    assert state is None
    want = np.asarray(gated_mlp(params.shared, x), np.float64)
    for t in range(T):
        for k in range(K):
            e = int(routing.topk_idx[t, k])
            if e == E:
                continue
            expert = jax.tree.map(lambda leaf, e=e: leaf[e], params.experts)
            out = np.asarray(gated_mlp(expert, x[t]), np.float64)
            want[t] += out * float(routing.topk_weights[t, k])
    np.testing.assert_allclose(y, want, atol=1e-5 * np.abs(want).max())


def test_a_padded_row_is_the_shared_expert_alone(params, x):
    y = MOE(params, x, CFG, mask=MASK)[0]
    alone = jax.jit(gated_mlp)(params.shared, x)
    np.testing.assert_allclose(y[1], alone[1], atol=1e-6)
    bare = MOE(params.replace(shared=None), x, CFG, mask=MASK)[0]
    np.testing.assert_array_equal(bare[1], np.zeros(D))
    np.testing.assert_allclose(y - alone, bare, atol=1e-5)


def test_metrics_count_valid_assignments(params, x):
    _, routing, _, metrics = MOE(params, x, CFG, mask=MASK)
    assert metrics.expert_load.sum() == int(MASK.sum()) * K
    ids = np.asarray(routing.topk_idx)
    np.testing.assert_array_equal(
        metrics.expert_load, np.bincount(ids.ravel(), minlength=E + 1)[:E]
    )
    assert metrics.lookups == metrics.hits == len(np.unique(ids[ids < E]))
    assert metrics.assignments_dropped == metrics.demand_fetches == 0 and metrics.waves == 1
    assert metrics.load_balancing_loss > 0 and metrics.router_z_loss > 0


def test_gradients_equal_those_of_the_reference_stage(params, x):
    @partial(jax.jit, static_argnames="stage")
    def grads(params, x, stage):
        def loss(params, x):
            y, _, _, metrics = moe(params, x, CFG, mask=MASK, stage=stage)
            return jnp.sum(jnp.sin(y)) + metrics.load_balancing_loss + metrics.router_z_loss

        return jax.grad(loss, (0, 1))(params, x)

    got, want = grads(params, x, resident), grads(params, x, reference)
    assert_close(got, want)
    assert np.abs(got[0].router.w_router).max() > 1e-3


def test_forced_choices_are_taken(params, x):
    forced = jnp.asarray([[7, 0], [3, 4], [0, 7], [5, 6]], jnp.int32)
    y, routing, _, metrics = MOE(params, x, CFG, forced_idx=forced)
    np.testing.assert_array_equal(routing.topk_idx, forced)
    np.testing.assert_array_equal(metrics.expert_load, [2, 0, 0, 1, 1, 1, 1, 2])
    # The order of a token's experts does not matter beyond rounding; which ones does.
    swapped = MOE(params, x, CFG, forced_idx=forced[:, ::-1])[0]
    np.testing.assert_allclose(y, swapped, atol=1e-5)
    assert np.abs(y - MOE(params, x, CFG, forced_idx=(forced + 1) % E)[0]).max() > 0.01


def test_the_stage_gets_the_layer_and_its_state_and_its_counts_are_reported(params, x):
    def spy(rows, routing, weights, layer, state):
        assert layer.dtype == jnp.int32 and weights is None
        outputs = jnp.full((T, K, D), layer.astype(jnp.float32))
        counts = StageCounts(
            **{name: jnp.int32(i) for i, name in enumerate(StageCounts.__dataclass_fields__)}
        )
        return outputs, state + layer, counts

    bare = params.replace(experts=None, shared=None)
    y, routing, state, metrics = moe(bare, x, CFG, stage=spy, stage_state=jnp.int32(10), layer=3)
    assert state == 13
    want = 3 * np.asarray(route(params.router, x, CFG.router).topk_weights).sum(-1)
    np.testing.assert_allclose(y, want[:, None].repeat(D, 1), rtol=1e-6)
    for i, name in enumerate(StageCounts.__dataclass_fields__):
        assert getattr(metrics, name) == i


def test_bfloat16_activations_and_a_float32_router(params, x):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params).replace(
        router=params.router
    )
    y, routing, _, metrics = MOE(half, x.astype(jnp.bfloat16), CFG)
    assert y.dtype == jnp.bfloat16
    assert routing.topk_weights.dtype == routing.router_logits.dtype == jnp.float32
    assert metrics.load_balancing_loss.dtype == jnp.float32
    full = MOE(params, x, CFG, forced_idx=routing.topk_idx)[0]
    assert_close(y, full, tolerance=0.05)


def test_initial_parameters_have_the_configured_shapes(key):
    def shapes(cfg, dtype):
        return jax.eval_shape(lambda: init_moe(key, D, cfg, out_scale=0.5, dtype=dtype))

    params = shapes(CFG, jnp.bfloat16)
    assert params.experts.w_down.shape == (E, F, D) and params.shared.w_up.shape == (D, 5)
    assert params.experts.w_gate.dtype == params.shared.w_down.dtype == jnp.bfloat16
    assert params.router.w_router.dtype == jnp.float32
    assert shapes(MoEConfig(d_ff=F, router=CFG.router), jnp.float32).shared is None


def test_impossible_configs_are_refused():
    with pytest.raises(InputError, match="d_ff=0 must be at least 1"):
        MoEConfig(d_ff=0, router=CFG.router)
    with pytest.raises(InputError, match="shared_d_ff=-1 must not be negative"):
        MoEConfig(d_ff=4, shared_d_ff=-1, router=CFG.router)
