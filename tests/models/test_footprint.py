"""Bytes of a decoder besides its experts, counted by hand."""

import jax
import pytest

from moejax.core.errors import InputError
from moejax.core.memory import nbytes
from moejax.core.mesh import make_mesh
from moejax.layers.attention import MLAConfig
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, LayerGroup
from moejax.models.experts import split_experts
from moejax.models.footprint import footprint, plan_offload, step_read_bytes
from moejax.models.params import init_decoder
from moejax.routing.config import RouterConfig

MOE = MoEConfig(d_ff=6, router=RouterConfig(num_experts=5, top_k=2), zero_experts=1)
CFG = DecoderConfig(
    vocab_size=16,
    d_model=8,
    attention=MLAConfig(num_heads=2, kv_rank=3, nope_dim=2, rope_dim=2, v_dim=2),
    groups=(LayerGroup(num_layers=1, d_ff=4), LayerGroup(num_layers=2, moe=MOE)),
)


def weights():
    init = lambda key: split_experts(init_decoder(key, CFG), CFG)  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0))


def test_everything_is_counted():
    dense, experts = weights()
    got = footprint(CFG, dense, experts, ranks=2, batch=3, capacity=10, lanes=1)
    assert got.kv_bytes == 3 * 3 * 10 * (3 + 2) * 4 + 3 * 4  # latents, rotated keys, lengths
    assert got.workspace_bytes == 4 * 30 * 2 * 8 * 4 + 30 * 16 * 4
    assert got.expert_bytes == 3 * 8 * 6 * 4
    assert got.dense_bytes == sum(leaf.size * 4 for leaf in jax.tree.leaves(dense))
    assert (got.num_layers, got.num_experts, got.landing_experts) == (2, 2, 2)


def test_a_budget_becomes_slots():
    dense, experts = weights()
    plan = lambda budget, predictor=0: plan_offload(  # noqa: E731
        budget, CFG, dense, experts, make_mesh(), batch=1, capacity=4, predictor_bytes=predictor
    )
    assert plan(None) is None and plan(1.0).num_slots == 7 and plan(10**9).num_slots == 8
    with pytest.raises(InputError, match="the minimum is 2 slots"):
        plan(0.1)
    with pytest.raises(InputError, match="5 prefetch lanes exceed the 4 experts of a layer"):
        plan_offload(0.5, CFG, dense, experts, make_mesh(), batch=1, capacity=4, lanes=5)
    fixed = footprint(CFG, dense, experts, ranks=1, batch=1, capacity=4).fixed_bytes
    three = fixed + 3 * 3 * 8 * 6 * 4
    assert plan(three).num_slots == plan(three + 7, predictor=7).num_slots == 3
    assert plan(three, predictor=7).num_slots == 2


def test_a_step_reads_an_embedding_only_where_it_is_the_output_too():
    dense, experts = weights()
    one, embed = 3 * 8 * 6 * 4, 16 * 8 * 4
    assert step_read_bytes(dense, experts, 3) == nbytes(dense) - embed + 3 * one
    tied = dense.replace(w_out=None)
    assert step_read_bytes(tied, experts, 0.5) == nbytes(tied) + one / 2
