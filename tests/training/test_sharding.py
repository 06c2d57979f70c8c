"""Training on a mesh: one loss and one gradient whatever the mesh, and runs that change meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.dispatch.config import DispatchConfig
from moejax.layers.moe import MoEConfig
from moejax.routing.config import RouterConfig
from moejax.training.loop import train
from moejax.training.loss import train_loss
from moejax.training.sharding import check_mesh, sharded_loss, state_shardings
from moejax.training.state import init_state
from tests.kernels.cases import assert_close
from tests.training.helpers import text_bytes, tiny_model, tiny_train

# Eight rows in all: an expert's rows come in one size, which compiles in a fraction of the time.
EXPERTS = MoEConfig(
    d_ff=8,
    shared_d_ff=4,
    router=RouterConfig(num_experts=5, top_k=1, renormalize=False),
    zero_experts=1,
)
MODEL = tiny_model(num_kv_heads=2, moe=EXPERTS)
CFG = tiny_train(batch_size=4, seq_len=2, router_z_weight=0.01)
ROOMY = DispatchConfig(strategy="hierarchical", capacity_factor=4.0)
GRAD = jax.jit(jax.value_and_grad(sharded_loss, has_aux=True), static_argnums=(2, 3, 4))


@pytest.fixture(scope="module")
def tokens():
    rows = text_bytes()[: 4 * 3].reshape(4, 3)
    return jnp.asarray(rows, jnp.int32)


@pytest.fixture(scope="module")
def want(tokens):
    params = init_state(MODEL, CFG).params
    grad_fn = jax.jit(jax.value_and_grad(train_loss, has_aux=True), static_argnums=(2, 3))
    return grad_fn(params, tokens, MODEL, CFG)


@pytest.mark.parametrize(
    ("data", "expert", "model", "axis_type", "fully_sharded", "dispatch"),
    [
        (1, 2, 1, "explicit", False, DispatchConfig()),
        pytest.param(4, 1, 1, "auto", False, DispatchConfig(), marks=pytest.mark.full),
        pytest.param(2, 2, 2, "auto", False, ROOMY, marks=pytest.mark.full),
        (2, 2, 2, "explicit", True, DispatchConfig()),
        (1, 4, 1, "auto", True, DispatchConfig(strategy="all_to_all", fall_back=True)),
        (2, 2, 1, "auto", True, dataclasses.replace(ROOMY, over_data=True)),
    ],
)
def test_loss_and_gradient_do_not_depend_on_the_mesh(
    data, expert, model, axis_type, fully_sharded, dispatch, tokens, want
):
    mesh = make_mesh(data=data, expert=expert, model=model, axis_type=axis_type)
    cfg = dataclasses.replace(CFG, fully_sharded=fully_sharded, dispatch=dispatch)
    check_mesh(mesh, MODEL, cfg)
    with jax.set_mesh(mesh):
        params = init_state(MODEL, cfg, mesh).params
        (loss, metrics), grads = GRAD(params, tokens, MODEL, cfg, mesh)
    (want_loss, want_metrics), want_grads = want
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    np.testing.assert_array_equal(metrics.expert_load, want_metrics.expert_load)
    np.testing.assert_allclose(
        metrics.load_balancing_loss, want_metrics.load_balancing_loss, rtol=1e-6
    )
    for got, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert_close(np.asarray(got), np.asarray(reference))
    assert metrics.assignments_dropped == 0
    layer, split = grads.groups[0], data * expert if fully_sharded else 1
    experts = expert * data if dispatch.over_data else expert
    for leaf, parts in (
        (layer.mlp.experts.w_gate, (1, experts, split // experts or 1, model)),
        (layer.attention.w_o, (1, model, 1, split)),
        (layer.mlp.router.w_router, (1, split, 1)),
        (layer.mlp_norm, (1, split)),
    ):
        shard = leaf.sharding.shard_shape(leaf.shape)
        assert tuple(n // m for n, m in zip(leaf.shape, shard, strict=True)) == parts


def test_a_run_continues_on_another_mesh_as_if_uninterrupted(tmp_path):
    steps = dict(horizon_steps=4, checkpoint_steps=2)
    cfg = tiny_train(batch_size=4, seq_len=2, **steps)
    data = text_bytes()
    whole = train(data, MODEL, cfg, path=tmp_path / "whole", mesh=make_mesh(data=2, expert=2))
    path = tmp_path / "moved"
    train(data, MODEL, cfg, path=path, mesh=make_mesh(expert=2))
    (latest,) = path.glob("4")
    for item in sorted(latest.rglob("*"), reverse=True):
        item.unlink() if item.is_file() else item.rmdir()
    latest.rmdir()
    moved = train(data, MODEL, cfg, path=path, mesh=make_mesh(data=4))
    assert moved.resumed_step == 2
    np.testing.assert_allclose(moved.history["loss"], whole.history["loss"], rtol=1e-6)


def test_weights_on_a_mesh_are_those_of_one_device():
    mesh = make_mesh(data=2, expert=2)
    state, alone = init_state(MODEL, CFG, mesh), init_state(MODEL, CFG)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == state_shardings(state, mesh, CFG)
    for got, reference in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(got, reference)


def test_what_does_not_divide_is_refused():
    with pytest.raises(InputError, match="batch_size=4 is not divisible by data .* 8 ranks"):
        check_mesh(make_mesh(data=8), MODEL, CFG)
    experts = MODEL.moe.num_experts
    with pytest.raises(InputError, match=f"num_experts={experts} is not divisible"):
        check_mesh(make_mesh(expert=3), MODEL, CFG)
