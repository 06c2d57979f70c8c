"""The decoder: structure, causality, KV cache, padding, replay, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.errors import InputError
from moejax.core.memory import device_sharding
from moejax.core.mesh import make_mesh
from moejax.experts.gated import gated_mlp
from moejax.experts.stage import reference
from moejax.layers.attention import AttentionConfig, self_attention
from moejax.layers.moe import MoEConfig, moe
from moejax.layers.norm import rms_norm
from moejax.models.config import DecoderConfig, LayerGroup
from moejax.models.decoder import forward, init_cache, init_decoder, unembed
from moejax.routing.config import RouterConfig
from tests.kernels.cases import assert_close

B, S, V, D, E, K, LM = 2, 3, 16, 12, 8, 2, 2
T = B * S
# A leading dense layer and two MoE layers, as DeepSeek has it.
CFG = DecoderConfig(
    vocab_size=V,
    d_model=D,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
    groups=(
        LayerGroup(num_layers=1, d_ff=5),
        LayerGroup(
            num_layers=LM,
            moe=MoEConfig(d_ff=6, shared_d_ff=3, router=RouterConfig(num_experts=E, top_k=K)),
        ),
    ),
    embed_scale=3.0,
)
FORWARD = jax.jit(forward, static_argnames=("cfg", "stage"))


@pytest.fixture(scope="module")
def params():
    """Random weights of unit gain, large enough that attention and experts matter."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_decoder(jax.random.key(0), CFG))

    def normal(leaf):
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else 1
        return jnp.asarray(rng.normal(size=leaf.shape) * fan_in**-0.5, leaf.dtype)

    return jax.tree.map(normal, shapes)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).permutation(V)[:T].reshape(B, S), jnp.int32)


@pytest.fixture(scope="module")
def full(params, tokens):
    return FORWARD(params, tokens, CFG)


@pytest.fixture(scope="module")
def short(params, tokens):
    """The first sequence alone: few rows, which compile quickly."""
    return FORWARD(params, tokens[:1], CFG)


def unrolled(params, tokens):
    """The decoder as a plain loop over its layers."""
    x = params.embed[tokens] * CFG.embed_scale
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None].repeat(len(tokens), 0)
    for group, stack in zip(CFG.groups, params.groups, strict=True):
        for i in range(group.num_layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
            h = rms_norm(x, layer.attention_norm, CFG.norm_eps)
            x = x + self_attention(layer.attention, h, positions, CFG.attention)
            h = rms_norm(x, layer.mlp_norm, CFG.norm_eps).reshape(-1, D)
            if group.moe:
                y = moe(layer.mlp, h, group.moe, stage=reference)[0]
            else:
                y = gated_mlp(layer.mlp, h)
            x = x + y.reshape(x.shape)
    return rms_norm(x, params.final_norm, CFG.norm_eps) @ params.w_out


def test_scan_equals_a_plain_loop_in_value_and_gradient(params, tokens, full):
    first = tokens[:1]

    def value_and_grads(run):
        def loss(params):
            logits = run(params)
            return jnp.sum(jnp.sin(logits)), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, logits), grads = value_and_grads(lambda p: forward(p, first, CFG).logits)
    (_, want), want_grads = value_and_grads(lambda p: unrolled(p, first))
    assert_close((logits, grads), (want, want_grads), tolerance=2e-5)
    assert_close(full.logits[:1], want)
    for leaf in jax.tree.leaves(grads):
        assert np.abs(leaf).max() > 0


def test_logits_depend_on_no_later_token_and_no_other_sequence(params, tokens):
    """All tokens differ, so row `token` of the embedding's gradient is its position's."""

    @jax.jit
    def grad(params, b, t):
        def loss(params):
            return jnp.sum(jnp.sin(forward(params, tokens, CFG, stage=reference).logits[b, t]))

        return jax.grad(loss)(params)

    for b, t in ((0, 1), (1, 2)):
        reach = np.abs(grad(params, b, t).embed).max(-1)[np.asarray(tokens)] > 0  # [B, S]
        want = np.zeros((B, S), bool)
        want[b, : t + 1] = True
        np.testing.assert_array_equal(reach, want)


def test_decoding_token_by_token_equals_the_full_sequence(params, tokens, full):
    cache = init_cache(CFG, B, S + 1)
    for t in range(S):
        out = FORWARD(params, tokens[:, t : t + 1], CFG, cache=cache)
        cache = out.cache
        np.testing.assert_allclose(out.logits[:, 0], full.logits[:, t], atol=2e-5)
        assert cache.length.tolist() == [t + 1] * B
        np.testing.assert_array_equal(
            out.record.topk_idx, full.record.topk_idx.reshape(LM, B, S, K)[:, :, t]
        )


def test_a_padded_batch_gives_each_row_what_it_gives_alone(params, tokens, full):
    """Lengths 3 and 2, prefill and one more token of each, against the rows alone."""
    mask = jnp.asarray([[True] * 3, [True, True, False]])
    lengths, nxt = [3, 2], tokens[::-1, :1]
    out = FORWARD(params, tokens, CFG, cache=init_cache(CFG, B, S + 1), mask=mask)
    assert out.cache.length.tolist() == lengths
    after = FORWARD(params, nxt, CFG, cache=out.cache)
    assert after.cache.length.tolist() == [4, 3]
    np.testing.assert_allclose(out.logits[0], full.logits[0], atol=2e-5)
    alone = FORWARD(params, jnp.concatenate([tokens[1, :2], nxt[1]])[None], CFG)
    np.testing.assert_allclose(out.logits[1, :2], alone.logits[0, :2], atol=2e-5)
    np.testing.assert_allclose(after.logits[1, 0], alone.logits[0, 2], atol=2e-5)
    # Padding is routed nowhere and counted nowhere.
    ids = out.record.topk_idx.reshape(LM, B, S, K)
    assert np.all((ids < E) == mask[None, :, :, None])
    np.testing.assert_array_equal(out.metrics.expert_load.sum(-1), [5 * K] * LM)
    np.testing.assert_array_equal(full.metrics.expert_load.sum(-1), [T * K] * LM)
    # What stands in the padding does not change a bit.
    other = FORWARD(
        params,
        jnp.where(mask, tokens, (tokens + 3) % V),
        CFG,
        cache=init_cache(CFG, B, S + 1),
        mask=mask,
    )
    np.testing.assert_array_equal(other.logits[0], out.logits[0])
    np.testing.assert_array_equal(other.logits[1, :2], out.logits[1, :2])


def test_recorded_routing_can_be_replayed(params, tokens, short):
    recorded = short.record.topk_idx
    again = FORWARD(params, tokens[:1], CFG, forced_idx=recorded)
    np.testing.assert_allclose(again.logits, short.logits, atol=1e-6)
    np.testing.assert_allclose(again.record.topk_weights, short.record.topk_weights, atol=1e-6)
    other = (recorded + 1 + jnp.arange(LM, dtype=jnp.int32)[:, None, None]) % E
    forced = FORWARD(params, tokens[:1], CFG, forced_idx=other)
    np.testing.assert_array_equal(forced.record.topk_idx, other)
    assert np.abs(forced.logits - short.logits).max() > 0.01


def test_record_holds_what_the_gates_saw(params, full):
    record, routers = full.record, params.groups[1].mlp.router.w_router
    assert record.hidden.shape == (LM, T, D)
    want = np.einsum("ltd,lde->lte", record.hidden, routers)
    np.testing.assert_allclose(record.router_logits, want, atol=1e-5)
    np.testing.assert_array_equal(np.argsort(-want, axis=-1)[..., :K], record.topk_idx)


def test_logits_of_one_position_per_row_are_made_alone(params, tokens, full):
    at = jnp.asarray([2, 0], jnp.int32)
    run = jax.jit(lambda p, t, at: forward(p, t, CFG, logits_at=at, stage=reference).logits)
    logits = run(params, tokens, at)
    np.testing.assert_allclose(logits[:, 0], full.logits[jnp.arange(B), at], atol=2e-5)
    text = run.lower(params, tokens, at).compile().as_text()
    assert f"f32[{B},1,{V}]" in text and f"f32[{B},{S},{V}]" not in text


def test_a_record_that_is_not_used_costs_nothing(params, tokens):
    def compiled(pick):
        run = jax.jit(lambda p, t: pick(forward(p, t, CFG, stage=reference)))
        return run.lower(params, tokens).compile().as_text()

    buffers = [f"f32[{LM},{T},{D}]", f"f32[{LM},{T},{E}]", f"s32[{LM},{T},{K}]"]
    recorded = compiled(lambda out: (out.logits, out.record))
    unused = compiled(lambda out: out.logits)
    assert [buffer in recorded for buffer in buffers] == [True] * 3
    assert [buffer in unused for buffer in buffers] == [False] * 3


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_replicated_on_a_mesh_it_computes_the_same(axis_type, params, tokens, short):
    mesh = make_mesh(expert=2, axis_type=axis_type)
    with jax.set_mesh(mesh):
        out = FORWARD(*jax.device_put((params, tokens[:1]), device_sharding(mesh, P())), CFG)
    np.testing.assert_allclose(out.logits, short.logits, atol=1e-6)
    np.testing.assert_array_equal(out.record.topk_idx, short.record.topk_idx)
    assert out.logits.sharding.is_fully_replicated


def test_tied_embeddings_serve_both_ends(params, key):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 2, D)), jnp.float32)
    tied = params.replace(w_out=None, final_norm=params.final_norm * 2)
    want = 2 * np.asarray(rms_norm(x, params.final_norm, CFG.norm_eps)) @ np.asarray(params.embed).T
    np.testing.assert_allclose(unembed(tied, x, CFG), want, atol=1e-5)
    cfg = dataclasses.replace(CFG, tie_embeddings=True)
    assert jax.eval_shape(lambda: init_decoder(key, cfg)).w_out is None


def test_layers_start_from_weights_of_their_own():
    key = jax.random.key(0, impl="rbg")  # compiles many times faster than threefry
    small = dataclasses.replace(CFG, groups=(dataclasses.replace(CFG.groups[1], num_layers=2),))
    params = jax.jit(init_decoder, static_argnames="cfg")(key, small)
    stack = params.groups[0]
    for leaf in jax.tree.leaves((stack.attention, stack.mlp)):
        assert leaf.shape[0] == 2 and not np.array_equal(leaf[0], leaf[1])
    # Residual branches shrink by sqrt(2 * layers).
    np.testing.assert_allclose(np.std(stack.mlp.experts.w_down), (4 * 6) ** -0.5, rtol=0.1)
    np.testing.assert_allclose(np.std(stack.mlp.experts.w_up), D**-0.5, rtol=0.1)


def test_cached_bfloat16_is_read_layer_by_layer(tokens):
    """XLA:CPU converts a stack that it slices, and a cache that it writes to, as a whole."""
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    params = jax.eval_shape(lambda: init_decoder(jax.random.key(0), cfg))
    params = jax.tree.map(lambda leaf: jnp.asarray(np.ones(leaf.shape), leaf.dtype), params)

    def compiled(as_bits):
        cache = init_cache(cfg, B, 7, as_bits=as_bits)
        program = FORWARD.lower(params, tokens, cfg, cache=cache).compile()
        return program(params, tokens, cache=cache), program.as_text()

    (plain, converts), (bits, text) = compiled(False), compiled(True)
    np.testing.assert_array_equal(plain.logits, bits.logits)
    np.testing.assert_array_equal(np.asarray(plain.cache.k).view(np.uint16), bits.cache.k)
    # Queries of two layers of four heads; three layers of keys or values.
    weights, kept = f"[{LM},{D},4,4]", f"[3,{B},7,2,4]"
    assert f"bf16{weights}" in text and f"f32{weights}" not in text
    assert f"u16{kept}" in text and f"f32{kept}" not in text
    assert f"f32{kept}" in converts


def test_bfloat16_model_has_float32_routers_and_logits(key):
    cfg = dataclasses.replace(CFG, dtype="bfloat16")

    def run():
        params = init_decoder(key, cfg)
        tokens = jnp.zeros((B, S), jnp.int32)
        return params, forward(params, tokens, cfg, cache=init_cache(cfg, B, S))

    params, out = jax.eval_shape(run)
    assert out.logits.dtype == jnp.float32 and out.cache.k.dtype == jnp.bfloat16
    assert out.record.hidden.dtype == jnp.bfloat16
    assert out.record.router_logits.dtype == out.record.topk_weights.dtype == jnp.float32
    routers = params.groups[1].mlp.router.w_router
    others = {leaf.dtype for leaf in jax.tree.leaves(params) if leaf.shape != routers.shape}
    assert routers.dtype == jnp.float32 and others == {jnp.dtype(jnp.bfloat16)}


def test_arguments_that_do_not_fit_are_refused(params, tokens):
    dense = dataclasses.replace(CFG, groups=CFG.groups[:1])
    forced = jnp.zeros((LM + 1, T, K), jnp.int32)
    for cfg, kwargs, message in [
        (CFG, dict(mask=jnp.ones((B, S + 1), bool)), r"mask is \(2, 4\), tokens are \(2, 3\)"),
        (CFG, dict(forced_idx=forced), r"forced_idx is \(3, 6, 2\), expected \(2, 6, 2\)"),
        (CFG, dict(cache=init_cache(CFG, B, S - 1)), "3 positions exceed the 2 of the cache"),
        (CFG, dict(cache=init_cache(CFG, B + 1, S)), "the cache holds 3 sequences, tokens 2"),
        (dense, {}, "without MoE layers"),
    ]:
        with pytest.raises(InputError, match=message):
            forward(params, tokens, cfg, **kwargs)
