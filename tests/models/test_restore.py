"""Experts go from the checkpoint straight to pinned host memory, on any size of the expert axis."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.checkpoint import manager as checkpoints
from moejax.checkpoint.config_json import to_json
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.models.decoder import init_decoder
from moejax.models.restore import abstract_params, restore_params
from tests.training.helpers import tiny_model


@pytest.fixture(scope="module")
def cfg():
    return tiny_model(dtype="bfloat16")


@pytest.fixture(scope="module")
def saved(cfg, tmp_path_factory):
    """Host copies of the weights, and the folder of their checkpoint."""
    path = tmp_path_factory.mktemp("model")
    shapes = jax.eval_shape(lambda: init_decoder(jax.random.key(0), cfg))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)
    write(path, params, {"model": to_json(cfg)})
    return params, path


def write(path, params, extra):
    optimizer = {"step": jnp.int32(3)}
    with checkpoints.open_manager(path) as manager:
        checkpoints.save(manager, 3, params=params, optimizer=optimizer, extra=extra)
        checkpoints.finish(manager)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
@pytest.mark.parametrize("expert", [1, 2, 4])
def test_experts_land_in_pinned_host_and_nowhere_else(saved, cfg, expert, axis_type):
    params, path = saved
    mesh = make_mesh(expert=expert, axis_type=axis_type)
    before = {id(a) for a in jax.live_arrays()}
    restored, stored = restore_params(path, mesh=mesh)
    new = [a for a in jax.live_arrays() if id(a) not in before]
    assert stored == cfg
    assert_equal(restored, params)
    experts = restored.groups[0].mlp.experts
    for leaf in jax.tree.leaves(experts):
        assert leaf.sharding.memory_kind == "pinned_host"
        assert leaf.sharding.spec == P(None, "expert")
        layers, num_experts = leaf.shape[:2]
        shards = [s.data.shape[:2] for s in leaf.addressable_shards]
        assert shards == [(layers, num_experts // expert)] * expert
    on_host = {id(leaf) for leaf in jax.tree.leaves(experts)}
    others = [leaf for leaf in jax.tree.leaves(restored) if id(leaf) not in on_host]
    assert {leaf.sharding.memory_kind for leaf in others} == {"device"}
    assert all(leaf.sharding.is_fully_replicated for leaf in others)
    # No array of a stack's size is left on the device.
    stack = min(leaf.size for leaf in jax.tree.leaves(experts))
    big = [a for a in new if a.size >= stack and id(a) not in {id(x) for x in others}]
    assert {a.sharding.memory_kind for a in big} == {"pinned_host"}
    assert len(big) >= 3


def test_experts_on_the_device_when_asked(saved):
    params, path = saved
    restored, _ = restore_params(path, mesh=make_mesh(expert=2), expert_memory="device")
    assert_equal(restored, params)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored)}
    assert kinds == {"device"}


def test_abstract_params_reads_nothing(cfg):
    mesh = make_mesh(expert=2)
    abstract = abstract_params(cfg, mesh=mesh, expert_memory="pinned_host")
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    assert abstract.groups[0].mlp.router.w_router.sharding.memory_kind == "device"


def refused(*args, **kwargs):
    with pytest.raises(InputError) as error:
        restore_params(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refuses_what_does_not_fit(saved, cfg, tmp_path):
    params, path = saved
    other = dataclasses.replace(cfg, norm_eps=1e-5)
    assert "of another model: norm_eps=1e-06, not 1e-05" in refused(path, other, mesh=make_mesh())
    message = refused(path, mesh=make_mesh(expert=8))
    assert message == "num_experts=4 is not divisible by expert axis size 8"
    assert "9 is not a checkpoint of moejax" in refused(path, mesh=make_mesh(), step=9)
    write(tmp_path / "no_model", params, {})
    assert "not a decoder's" in refused(tmp_path / "no_model", mesh=make_mesh())
    config = to_json(cfg) | {"d_model": "16"}
    write(tmp_path / "foreign", params, {"model": config})
    assert "model.d_model wants int, got '16'" in refused(tmp_path / "foreign", mesh=make_mesh())
    config = to_json(dataclasses.replace(cfg, vocab_size=300))
    write(tmp_path / "shapes", params, {"model": config})
    message = refused(tmp_path / "shapes", mesh=make_mesh())
    assert "leaf embed is bfloat16[256, 16], want bfloat16[300, 16]" in message
