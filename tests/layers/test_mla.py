"""Latent attention against numpy with keys and values of every head spelled out; its cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.layers.attention import MLAConfig, cached_attention, init_any, self_attention
from moejax.layers.rope import RopeConfig
from tests.layers.test_rope import plain_rope

B, S, D, THETA = 2, 5, 10, 100.0
CFG = MLAConfig(
    num_heads=3,
    kv_rank=7,
    q_rank=6,
    nope_dim=4,
    rope_dim=2,
    v_dim=5,
    rope=RopeConfig(theta=THETA),
    q_scale=1.5,
    kv_scale=0.7,
)
SELF = jax.jit(self_attention, static_argnames="cfg")
CACHED = jax.jit(cached_attention, static_argnames="cfg")


def inputs(cfg):
    params = init_any(jax.random.key(0), D, cfg, out_scale=1.0, dtype=jnp.float32)
    x = np.random.default_rng(1).normal(size=(B, S, D)).astype(np.float32)
    positions = np.arange(S, dtype=np.int32)[None].repeat(B, 0)
    return params, jnp.asarray(x), jnp.asarray(positions)


def plain(params, x, positions, cfg):
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, positions = np.asarray(x, np.float64), np.asarray(positions)

    def norm(v, weight):
        return v / np.sqrt(np.mean(v * v, -1, keepdims=True) + 1e-6) * weight

    narrow = x if w.w_q_down is None else norm(x @ w.w_q_down, w.q_norm)
    q = np.einsum("bsq,qhe->bshe", narrow, w.w_q) * cfg.q_scale
    both = x @ w.w_kv_down
    latent = norm(both[..., : cfg.kv_rank], w.kv_norm) * cfg.kv_scale
    k_rope = plain_rope(both[..., None, cfg.kv_rank :], positions, THETA)
    k_nope, v = (np.einsum("bsr,rhe->bshe", latent, m) for m in (w.w_k, w.w_v))
    heads = np.repeat(k_rope, cfg.num_heads, axis=2)
    k = np.concatenate([k_nope, heads], -1)
    q_rope = plain_rope(q[..., cfg.nope_dim :], positions, THETA)
    q = np.concatenate([q[..., : cfg.nope_dim], q_rope], -1)
    scores = np.einsum("bshe,bche->bhsc", q, k) * (cfg.nope_dim + cfg.rope_dim) ** -0.5
    scores = np.where(np.tril(np.ones((S, S), bool)), scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    return np.einsum("bhsc,bchv,hvd->bsd", probs, v, w.w_o)


@pytest.mark.parametrize("cfg", [CFG, dataclasses.replace(CFG, q_rank=0)], ids=["ranks", "no rank"])
def test_equals_attention_with_expanded_heads(cfg):
    params, x, positions = inputs(cfg)
    want = plain(params, x, positions, cfg)
    np.testing.assert_allclose(SELF(params, x, positions, cfg), want, atol=1e-5 * abs(want).max())


def test_the_cache_holds_latents_and_gives_what_the_full_sequence_gives():
    params, x, positions = inputs(CFG)
    want = SELF(params, x, positions, CFG)
    (_, rank), (_, rope_dim) = CFG.cache_dims
    k, v = jnp.full((2, B, S, 1, rank), 1e3), jnp.full((2, B, S, 1, rope_dim), 1e3)
    for start, stop in ((0, 3), (3, 5)):
        part = slice(start, stop)
        args = (params, x[:, part], positions[:, part], k, v, jnp.int32(1))
        y, k, v = CACHED(*args, CFG)
        np.testing.assert_allclose(y, want[:, part], atol=2e-6)
    assert np.all(k[0] == 1e3) and np.all(np.asarray(k[1]) != 1e3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kv_rank=0), "kv_rank=0 must be at least 1"),
        (dict(q_rank=-1), "q_rank=-1 must not be negative"),
        (dict(rope_dim=3), "rope_dim=3 must be even"),
        (dict(rope=RopeConfig(divisors=(1.0, 2.0))), "rope has 2 divisors for 1 pairs of dims"),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CFG, **fields)
