"""Grouped-query attention against plain numpy, and the cache against the full sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.layers import gqa
from moejax.layers.attention import (
    AttentionConfig,
    AttentionParams,
    cached_attention,
    init_attention,
    sees,
    self_attention,
)
from moejax.layers.rope import RopeConfig
from tests.layers.test_rope import plain_rope

B, S, D, H, DH, THETA = 2, 6, 10, 4, 6, 100.0
SELF = jax.jit(self_attention, static_argnames="cfg")
CACHED = jax.jit(cached_attention, static_argnames="cfg")


def config(kv: int) -> AttentionConfig:
    return AttentionConfig(num_heads=H, num_kv_heads=kv, head_dim=DH, rope=RopeConfig(theta=THETA))


def params_of(kv: int, dtype=jnp.float32) -> AttentionParams:
    rng = np.random.default_rng(kv)
    shapes = dict(w_q=(D, H, DH), w_k=(D, kv, DH), w_v=(D, kv, DH), w_o=(H, DH, D))
    return AttentionParams(
        **{name: jnp.asarray(rng.normal(size=s) * D**-0.5, dtype) for name, s in shapes.items()}
    )


def inputs(batch=B, length=S):
    x = np.random.default_rng(7).normal(size=(batch, length, D)).astype(np.float32)
    positions = np.arange(length, dtype=np.int32)[None].repeat(batch, 0)
    return jnp.asarray(x), jnp.asarray(positions)


def plain_attention(params, x, positions, kv):
    w = {name: np.asarray(leaf, np.float64) for name, leaf in vars(params).items()}
    x, positions = np.asarray(x, np.float64), np.asarray(positions)
    q = plain_rope(np.einsum("bsd,dhe->bshe", x, w["w_q"]), positions, THETA)
    k = plain_rope(np.einsum("bsd,dhe->bshe", x, w["w_k"]), positions, THETA)
    v = np.einsum("bsd,dhe->bshe", x, w["w_v"])
    out = np.zeros_like(x)
    for b, s in np.ndindex(positions.shape):
        for h in range(H):
            g = h // (H // kv)  # neighbouring query heads share a KV head
            score = k[b, : s + 1, g] @ q[b, s, h] / np.sqrt(DH)
            share = np.exp(score - score.max())
            out[b, s] += (share / share.sum()) @ v[b, : s + 1, g] @ w["w_o"][h]
    return out


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_equals_plain_numpy_for_every_ratio_of_heads(kv):
    params, (x, positions) = params_of(kv), inputs()
    got = SELF(params, x, positions, config(kv))
    want = plain_attention(params, x, positions, kv)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_the_cache_gives_what_the_full_sequence_gives():
    """Prefill of 3 and 2 positions, sequences one position apart; layer 1 of 3."""
    cfg, params, (x, positions) = config(2), params_of(2), inputs()
    want = SELF(params, x, positions, cfg)
    # Positions that are not filled yet hold rubbish that attention must never look at.
    k = v = jnp.full((3, B, S + 2, 2, DH), 1e3)
    layer = jnp.int32(1)
    for start, stop in ((0, 3), (3, 5)):
        part = slice(start, stop)
        y, k, v = CACHED(params, x[:, part], positions[:, part], k, v, layer, cfg)
        np.testing.assert_allclose(y, want[:, part], atol=2e-6)
    for cache in (k, v):
        np.testing.assert_array_equal(cache[jnp.array([0, 2])], np.full((2, *k.shape[1:]), 1e3))
        assert np.all(cache[1, :, :5] != 1e3) and np.all(cache[1, :, 5:] == 1e3)


def test_sequences_of_unequal_length_do_not_meet():
    """One step of two sequences, one at position 4 and one at position 1."""
    cfg, params, (x, positions) = config(2), params_of(2), inputs()
    want = SELF(params, x, positions, cfg)
    k = v = jnp.zeros((1, B, S, 2, DH))
    layer = jnp.int32(0)
    _, k, v = CACHED(params, x[:, :4], positions[:, :4], k, v, layer, cfg)
    # The second sequence keeps one position; what it wrote past that is stale.
    now = jnp.asarray([[4], [1]], jnp.int32)
    new = jnp.stack([x[0, 4:5], x[1, 1:2]])
    y, k, v = CACHED(params, new, now, k, v, layer, cfg)
    np.testing.assert_allclose(y[0, 0], want[0, 4], atol=2e-6)
    np.testing.assert_allclose(y[1, 0], want[1, 1], atol=2e-6)


def test_positions_past_the_cache_are_dropped_and_overwrite_nothing():
    cfg, params, (x, positions) = config(2), params_of(2), inputs()
    k = v = jnp.zeros((1, B, 4, 2, DH))
    layer = jnp.int32(0)
    _, k, v = CACHED(params, x[:, :4], positions[:, :4], k, v, layer, cfg)
    _, k2, v2 = CACHED(params, x[:, 4:5], positions[:, 4:5], k, v, layer, cfg)
    np.testing.assert_array_equal(k2, k)
    np.testing.assert_array_equal(v2, v)


def test_windows_and_chunks_hide_positions():
    query, key = jnp.arange(6)[:, None], jnp.arange(6)[None]
    window = np.asarray(sees(query, key, dataclasses.replace(config(2), window=2)))
    chunk = np.asarray(sees(query, key, dataclasses.replace(config(2), chunk=4)))
    for q, k in np.ndindex(6, 6):
        assert window[q, k] == (k in (q - 1, q))
        assert chunk[q, k] == (k <= q and (k >= 4 or q < 4))


def test_a_sink_takes_its_share_of_every_head():
    """With values of one, a head gives what the softmax leaves to the positions."""
    cfg = dataclasses.replace(config(2), sinks=True)
    params, (x, positions) = params_of(2), inputs()
    sinks = jnp.asarray([-1.0, 0.0, 1.0, 2.0])
    params = params.replace(w_v=jnp.zeros_like(params.w_v), b_v=jnp.ones((2, DH)), sinks=sinks)
    q, k, v = gqa.project(params, x, positions, cfg)
    scores = np.einsum("bshe,bche->bhsc", q, np.repeat(k, 2, axis=2)) * DH**-0.5
    weight = np.exp(np.where(np.tril(np.ones((S, S), bool)), scores, -np.inf)).sum(-1)
    left = weight / (weight + np.exp(np.asarray(sinks))[None, :, None])
    want = np.einsum("bhs,hd->bsd", left, np.asarray(params.w_o).sum(1))
    np.testing.assert_allclose(SELF(params, x, positions, cfg), want, atol=1e-5)


def test_temperature_scales_late_queries():
    cfg = dataclasses.replace(config(2), rope=None, temperature=(2.0, 0.5))
    params, (x, positions) = params_of(2), inputs()
    q, _, _ = gqa.project(params, x, positions, cfg)
    plain, _, _ = gqa.project(params, x, positions, dataclasses.replace(cfg, temperature=None))
    steps = np.floor((np.arange(S) + 1) / 2)
    scale = 1 + 0.5 * np.log1p(steps)
    np.testing.assert_allclose(q, plain * scale[None, :, None, None], rtol=1e-6)


def test_bfloat16_in_and_out_with_float32_scores():
    cfg, (x, positions) = config(2), inputs()
    y = SELF(params_of(2, jnp.bfloat16), x.astype(jnp.bfloat16), positions, cfg)
    assert y.dtype == jnp.bfloat16
    want = plain_attention(params_of(2), x, positions, 2)
    assert np.abs(np.asarray(y, np.float32) - want).max() < 0.05 * np.abs(want).max()
    jaxpr = str(
        jax.make_jaxpr(lambda p, x: self_attention(p, x, positions, cfg))(
            params_of(2, jnp.bfloat16), x.astype(jnp.bfloat16)
        )
    )
    (softmax,) = [line for line in jaxpr.splitlines() if " = exp " in line]
    assert f"f32[{B},2,2,{S},{S}]" in softmax


def test_initial_weights(key):
    params = init_attention(
        key,
        64,
        AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=16),
        out_scale=0.5,
        dtype=jnp.bfloat16,
    )
    shapes = {name: w.shape for name, w in vars(params).items() if w is not None}
    assert shapes == dict(w_q=(64, 8, 16), w_k=(64, 2, 16), w_v=(64, 2, 16), w_o=(8, 16, 64))
    deviation = {name: np.std(np.asarray(getattr(params, name), np.float32)) for name in shapes}
    for name in ("w_q", "w_k", "w_v"):
        np.testing.assert_allclose(deviation[name], 64**-0.5, rtol=0.06)
    np.testing.assert_allclose(deviation["w_o"], 0.5 * 128**-0.5, rtol=0.06)
    assert params.w_q.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((6, 4, 8), "num_heads=6 is not divisible by num_kv_heads=4"),
        ((4, 0, 8), "num_kv_heads=0 must be at least 1"),
        ((4, 2, 7), "head_dim=7 must be positive and even"),
        ((4, 2, 0), "head_dim=0 must be positive and even"),
    ],
)
def test_impossible_configs_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        AttentionConfig(**dict(zip(("num_heads", "num_kv_heads", "head_dim"), sizes, strict=True)))
