"""The GPU benchmark at a tiny shape on a CPU: same weights from a seed, a budget, both sides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from configs.shapes import get_shape
from experiments.bench import offload_gpu, offload_gpu_torch
from moejax.core.errors import InputError
from moejax.core.memory import memory_kinds
from moejax.core.mesh import make_mesh
from moejax.models.decoder import init_decoder

CFG = dataclasses.replace(get_shape("tiny"), dtype="bfloat16")


@pytest.fixture(autouse=True)
def parsed():
    args = ["--batch=2", "--prompt=4", "--new_tokens=4", "--device_budget=80KiB", "--shape=tiny"]
    flags.FLAGS(["offload_gpu", *args])
    yield
    flags.FLAGS.unparse_flags()


def test_experts_are_drawn_into_host_memory():
    params, experts = offload_gpu.random_model(CFG, make_mesh(), seed=3)
    assert memory_kinds(experts) == {"pinned_host"} and memory_kinds(params) == {"device"}
    assert experts.w_gate.shape == (2, 8, 32, 24) and experts.w_gate.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves(experts):
        one = np.asarray(leaf, np.float32)
        np.testing.assert_allclose(one.std() * leaf.shape[2] ** 0.5, 1, atol=0.05)
        rows = one[:, :, 0].reshape(16, -1)
        assert len(np.unique(rows, axis=0)) == 16  # no layer and no expert is another's copy
    again = offload_gpu.random_model(CFG, make_mesh(), seed=3)
    jax.tree.map(np.testing.assert_array_equal, again, (params, experts))


def test_our_side_decodes_under_the_budget():
    found = offload_gpu.run_moejax(CFG, offload_gpu.works())
    assert not found["gpu"] and found["link_bytes_per_s"] > 0
    one = found["batch"]["2"]
    assert [len(row) for row in one["tokens"]] == [4, 4]
    assert 2 <= one["num_slots"] < 16 and 0 <= one["hit_rate"] < 1
    moved = one["bytes_per_token"] * one["tokens_per_s"]
    assert one["fraction_of_link"] == moved / found["link_bytes_per_s"] > 0


def test_the_other_side_has_the_same_shape_and_is_timed():
    """Without its hooks, which want another package."""
    model = offload_gpu_torch.random_model(CFG, 0, "cpu")
    mine = jax.eval_shape(lambda: init_decoder(jax.random.key(0), CFG))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(leaf.size for leaf in jax.tree.leaves(mine))
    weight = model.model.layers[1].mlp.experts.down_proj
    assert str(weight.dtype) == "torch.bfloat16"
    np.testing.assert_allclose(weight.float().std().item() * 24**0.5, 1, atol=0.05)
    (job,) = offload_gpu.works()
    figures = offload_gpu_torch.time_job(model, job, "cpu")
    assert figures["ttft_s"] > 0 and figures["tokens_per_s"] > 0


def test_wrong_input(monkeypatch):
    monkeypatch.setattr(offload_gpu_torch, "missing_packages", lambda: ["accelerate"])
    with pytest.raises(InputError, match="--only=accelerate wants accelerate: pip install"):
        offload_gpu.run_accelerate(CFG, [])
    for args, message in {
        "--device_budget=25%": "--device_budget=25% wants bytes such as 24GiB",
        "--batch=0": "--batch=0 is not a list of positive numbers",
    }.items():
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["offload_gpu", "--device_budget=1GiB", args])
        with pytest.raises(InputError, match=message):
            offload_gpu.main()
