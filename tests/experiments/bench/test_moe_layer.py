"""The benchmark's arms compute the same layer, and its figures are what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import moe_layer, moe_layer_arms, moe_layer_torch
from moejax.core.mesh import make_mesh
from tests.kernels.cases import assert_close

TINY = dataclasses.replace(moe_layer_arms.SHAPE, num_tokens=4, num_experts=8, d_model=8, d_ff=16)


@pytest.fixture(scope="module")
def weights():
    return moe_layer_arms.make_weights(TINY)


def test_all_arms_agree_in_value_and_gradient(weights):
    mesh = make_mesh(model=2)
    ours, ragged, reference = (
        jax.jit(moe_layer_arms.with_gradients(fn))
        for fn in (
            moe_layer_arms.over_devices(moe_layer_arms.moejax_layer, mesh),
            moe_layer_arms.ragged_layer,
            moe_layer_arms.reference_layer,
        )
    )
    for zipf in (0.0, 1.2):
        drawn = moe_layer_arms.make_inputs(TINY, zipf=zipf, routings=2)
        placed, split = moe_layer_arms.place(drawn, weights, mesh)
        for inputs, on_mesh in zip(drawn, placed, strict=True):
            want = reference(*inputs, weights)
            assert_close(jax.device_get(ours(*on_mesh, split)), want)
            assert_close(ragged(*inputs, weights), want)


def test_layer_is_the_weighted_sum_over_experts(weights):
    ((x, topk_idx, topk_weights),) = moe_layer_arms.make_inputs(TINY, zipf=0.0, routings=1)
    want = np.zeros_like(x)
    w, rows = jax.tree.map(np.asarray, (weights, x))
    for t, ids in enumerate(np.asarray(topk_idx)):
        for weight, e in zip(np.asarray(topk_weights)[t], ids, strict=True):
            gate = rows[t] @ w.w_gate[e]
            hidden = gate / (1 + np.exp(-gate)) * (rows[t] @ w.w_up[e])
            want[t] += weight * (hidden @ w.w_down[e])
    got = jax.jit(moe_layer_arms.moejax_layer)(x, topk_idx, topk_weights, weights)
    assert_close(got, want)


def test_yardsticks_do_the_same_number_of_operations(weights):
    inputs = moe_layer_arms.make_inputs(TINY, zipf=0.0, routings=1)
    useful = 6 * TINY.num_rows * TINY.d_model * TINY.d_ff
    for fn in (moe_layer_arms.dense_ffn, moe_layer_arms.balanced_ffn):
        arm = moe_layer_arms.Arm.compile(fn, inputs, weights)
        assert useful <= arm.compiled.cost_analysis()["flops"] <= 1.2 * useful


def test_experts_rotate():
    one_token = dataclasses.replace(moe_layer_arms.SHAPE, num_tokens=1)
    inputs = moe_layer_arms.make_inputs(one_token, zipf=0.0, routings=moe_layer.ROUTINGS)
    visited = np.concatenate([np.asarray(topk_idx).reshape(-1) for _, topk_idx, _ in inputs])
    assert sorted(visited) == list(range(32))


def test_bytes_read_count_distinct_experts(weights):
    ids = jnp.asarray([[0, 1], [1, 2]], jnp.int32)
    inputs = [(jnp.zeros((2, 8)), ids, jnp.ones((2, 2)))]
    assert moe_layer_arms.expert_bytes_read(inputs, weights) == 3 * 3 * 8 * 16 * 4


def test_arms_walk_through_their_inputs(weights):
    inputs = moe_layer_arms.make_inputs(TINY, zipf=0.0, routings=3)
    arm = moe_layer_arms.Arm.compile(moe_layer_arms.moejax_layer, inputs, weights)
    outputs = [np.asarray(arm()) for _ in range(4)]
    assert (outputs[0] == outputs[3]).all() and (outputs[0] != outputs[1]).any()
    assert arm.temp_mib > 0


def test_figures_and_table_say_when_an_arm_is_absent(monkeypatch, capsys):
    monkeypatch.setattr(moe_layer_torch, "PACKAGES", ("no_such_torch", "json"))
    measured = moe_layer.measure_transformers()
    assert measured == {"transformers_absent": "no_such_torch not installed"}
    times = {"of_medians": 0.7, "of_minima": 0.8, "quartiles": [0.6, 0.9]}
    for name in moe_layer.BARS:
        if not name.startswith("speedup_vs_transformers"):
            measured[name] = times
    measured |= {"gradient_temp_mib": 40.0, "stream_read_gb_per_s": 30.0}
    figures = moe_layer.make_figures(measured)
    assert figures["fraction_of_dense"] == {"random": 0.7, "zipf": 0.7}
    assert figures["speedup_vs_transformers"] == {"512": None, "16": None, "1": None}
    moe_layer.print_table(measured)
    text = capsys.readouterr().out
    assert "no_such_torch" in text and "NO" in text and "must" in text


def test_ratio_is_of_medians_and_minima():
    seconds = {"a": [2.0, 4.0, 6.0], "b": [1.0, 2.0, 4.0]}
    got = moe_layer.ratio(seconds, "a", "b")
    assert got["of_medians"] == 2.0 and got["of_minima"] == 2.0
    assert got["quartiles"][0] <= 2.0 <= got["quartiles"][1]
