"""The host store lives in pinned memory and is cut per rank."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import compat
from moejax.core.errors import InputError
from moejax.core.memory import fetch_rows, memory_kinds
from moejax.core.mesh import make_mesh
from moejax.experts.gated import init_experts
from moejax.offload.stage import OffloadConfig
from moejax.offload.store import check_platform, expert_bytes, flatten, to_device, to_host
from moejax.serving.engine import make_programs


@pytest.fixture
def experts(key):
    return init_experts(key, (2, 6), 8, 4, out_scale=1.0, dtype=jnp.float32)


def test_kinds_shards_and_bytes(experts):
    mesh = make_mesh(expert=2)
    host = to_host(experts, mesh)
    assert memory_kinds(host) == {"pinned_host"}
    assert host.w_gate.addressable_shards[1].data.shape == (2, 3, 8, 4)
    assert memory_kinds(to_device(experts, mesh)) == {"device"}
    assert expert_bytes(experts) == 3 * 8 * 4 * 4


def test_experts_must_divide_over_the_ranks(experts):
    with pytest.raises(InputError, match="num_experts=6 is not divisible by expert axis size 4"):
        to_host(experts, make_mesh(expert=4))


def test_flatten_rows_are_layer_major_and_fetchable(experts):
    host = to_host(experts, make_mesh())
    row = jax.jit(lambda s, i: fetch_rows(flatten(s), i))(host, jnp.int32(6 + 2))
    assert memory_kinds(row) == {"device"}
    np.testing.assert_array_equal(row.w_down, experts.w_down[1, 2])


def test_tpu_wants_whole_tiles(experts):
    with pytest.raises(InputError, match="multiples of 128, got 8 and 4"):
        check_platform(experts, "tpu")
    check_platform(experts, "cpu")


@pytest.mark.parametrize("platform", ["cuda", "gpu"])
def test_an_engine_refuses_cuda_with_unsound_host_slices(experts, monkeypatch, platform):
    mesh: Any = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    cfg: Any = None  # refused before anything else is looked at
    monkeypatch.setattr(compat, "JAX_VERSION", (0, 11, 0))
    with pytest.raises(InputError, match=f"on {platform} wants jax 0.11.1 .* this is 0.11.0"):
        make_programs(
            experts,
            cfg,
            mesh,
            capacity=8,
            offload=OffloadConfig(num_slots=4),
            prediction=None,
        )
    monkeypatch.setattr(compat, "JAX_VERSION", (0, 11, 1))
    check_platform(experts, platform)
