"""Experts apart from the other weights and back; a cycle is its layers one after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moejax.experts.stage import stacked
from moejax.layers.attention import AttentionConfig
from moejax.layers.moe import MoEConfig
from moejax.models.config import Cycle, DecoderConfig, LayerGroup
from moejax.models.decoder import forward, init_cache, init_decoder
from moejax.models.experts import join_experts, split_experts, stack_moe
from moejax.routing.config import RouterConfig

MOE = MoEConfig(d_ff=6, router=RouterConfig(num_experts=4, top_k=2))
NARROW = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4, window=2)
CFG = DecoderConfig(
    vocab_size=16,
    d_model=8,
    attention=dataclasses.replace(NARROW, window=0),
    groups=(
        LayerGroup(num_layers=1, moe=MOE),
        Cycle(
            repeats=2,
            groups=(
                LayerGroup(num_layers=2, moe=MOE, attention=NARROW),
                LayerGroup(num_layers=1, d_ff=5),
                LayerGroup(num_layers=1, moe=MOE),
            ),
        ),
    ),
)
TOKENS = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)


def test_experts_stack_in_layer_order_and_join_to_the_same_weights():
    params = init_decoder(jax.random.key(0), CFG)
    dense, experts = split_experts(params, CFG)
    assert CFG.num_moe_layers == 7 and experts.w_gate.shape == (7, 4, 8, 6)
    two, one = params.groups[1][0].mlp.experts.w_up, params.groups[1][2].mlp.experts.w_up
    first = params.groups[0].mlp.experts.w_up[0]
    in_order = [first, two[0, 0], two[0, 1], one[0, 0], two[1, 0], two[1, 1], one[1, 0]]
    np.testing.assert_array_equal(experts.w_up, np.stack(in_order))
    routers = stack_moe(params, CFG, lambda moe: moe.router.w_router)
    np.testing.assert_array_equal(routers[4], params.groups[1][0].mlp.router.w_router[1, 0])
    assert len(jax.tree.leaves(dense)) == len(jax.tree.leaves(params)) - 9
    jax.tree.map(np.testing.assert_array_equal, join_experts(dense, experts, CFG), params)


def test_a_cycle_gives_what_its_layers_give_one_by_one():
    """Logits, cache and metrics, with forced routing, and with all experts in one stack."""
    params = init_decoder(jax.random.key(1), CFG)
    cycle, layers = params.groups[1], [params.groups[0]]
    for repeat in range(2):
        layers += [jax.tree.map(lambda w, r=repeat: w[r], part) for part in cycle]
    groups = (CFG.groups[0], *CFG.groups[1].groups * 2)
    flat_cfg = dataclasses.replace(CFG, groups=groups)
    flat = dataclasses.replace(params, groups=tuple(layers))
    forced = jax.random.randint(jax.random.key(2), (7, 5, 2), 0, 4, dtype=jnp.int32)

    def run(params, cfg, **kwargs):
        return jax.jit(
            lambda p: forward(
                p, TOKENS, cfg, cache=init_cache(cfg, 1, 6), forced_idx=forced, **kwargs
            )
        )(params)

    want, got = run(flat, flat_cfg), run(params, CFG)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    np.testing.assert_array_equal(got.record.topk_idx, forced)
    dense, experts = split_experts(params, CFG)
    apart = run(dense, CFG, stage=stacked(experts))
    np.testing.assert_allclose(apart.logits, want.logits, atol=1e-5)
