"""Token-choice gates: linear or cosine logits, softmax or sigmoid scores, bias, groups, top-k.

The router runs in float32 whatever the model's dtype. Ties go to the lower expert id.

Axis letters:
    T  tokens    D  model dim    E  experts    K  experts per token    G  routing groups
    P  projected dim of the cosine logits
"""

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.structs import Routing
from moejax.routing.config import RouterConfig
from moejax.routing.sparse_mixer import sparse_mixer


@struct.dataclass(kw_only=True)
class RouterParams:
    """Weights of a gate, always float32."""

    w_router: jax.Array  # [D, E], or [P, E] with a projection
    correction_bias: jax.Array | None = None  # [E], None without `cfg.correction_bias`
    b_router: jax.Array | None = None  # [E], None without `cfg.bias`
    w_project: jax.Array | None = None  # [D, P], None without `cfg.projection_dim`
    temperature: jax.Array | None = None  # [], the same


def init_router(key: jax.Array, d_model: int, cfg: RouterConfig) -> RouterParams:
    """Normal weights of variance 1 / fan-in, a zero bias, the configured temperature."""

    def normal(key: jax.Array, rows: int, columns: int) -> jax.Array:
        return jax.random.normal(key, (rows, columns), jnp.float32) * rows**-0.5

    zeros = jnp.zeros((cfg.num_experts,), jnp.float32)
    biases = dict(
        correction_bias=zeros if cfg.correction_bias else None, b_router=zeros if cfg.bias else None
    )
    if not cfg.projection_dim:
        return RouterParams(w_router=normal(key, d_model, cfg.num_experts), **biases)
    k_router, k_project = jax.random.split(key)
    return RouterParams(
        w_router=normal(k_router, cfg.projection_dim, cfg.num_experts),
        **biases,
        w_project=normal(k_project, d_model, cfg.projection_dim),
        temperature=jnp.float32(cfg.temperature),
    )


def router_logits(params: RouterParams, x: jax.Array) -> jax.Array:
    """float32 [T, E] logits of x [T, D]: linear, or X-MoE's cosines over a temperature."""
    x = x.astype(jnp.float32)
    if params.w_project is None:
        logits = x @ params.w_router
    else:
        assert params.temperature is not None, "a projecting router has a temperature"
        cosines = unit(x @ params.w_project, axis=1) @ unit(params.w_router, axis=0)
        logits = cosines / params.temperature
    return logits if params.b_router is None else logits + params.b_router[None]


def unit(x: jax.Array, *, axis: int) -> jax.Array:
    """x at length 1 along `axis`. Zero stays zero, with a finite gradient: padding may be zero."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis, keepdims=True) + 1e-12)


def scores(logits: jax.Array, cfg: RouterConfig) -> jax.Array:
    """float32 [T, E] scores in (0, 1)."""
    if cfg.score == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    return jax.nn.sigmoid(logits)


def route(
    params: RouterParams,
    x: jax.Array,
    cfg: RouterConfig,
    *,
    mask: jax.Array | None = None,
    forced_idx: jax.Array | None = None,
) -> Routing:
    """Chooses `top_k` experts for each row of `x` [T, D].

    Args:
        mask: bool [T], False for padding. Padded tokens get `topk_idx == E` and weight 0.
        forced_idx: int32 [T, K], replays a recorded choice; the weights still come from `x`.
    """
    with jax.named_scope("moe_route"):
        logits = router_logits(params, x)
        if cfg.mixer_threshold:
            idx, weights = sparse_mixer(logits, cfg.top_k, cfg.mixer_threshold, forced_idx)
            return _masked(logits, idx, weights * cfg.scaling_factor, cfg, mask)
        score = scores(logits, cfg)
        idx = choose(score, params.correction_bias, cfg) if forced_idx is None else forced_idx
        return with_weights(logits, score, idx, cfg, mask=mask)


def choose(score: jax.Array, correction_bias: jax.Array | None, cfg: RouterConfig) -> jax.Array:
    """int32 [T, K] ids of the chosen experts, best first (group by group where balanced)."""
    biased = score if correction_bias is None else score + correction_bias[None]
    if cfg.group_choice == "balanced":
        return balanced_choice(biased, cfg.top_k, cfg.num_groups)
    if cfg.num_groups > 1:
        biased = jnp.where(_allowed_groups(biased, cfg), biased, -jnp.inf)
    return jax.lax.top_k(biased, cfg.top_k)[1]


def balanced_choice(score: jax.Array, top_k: int, num_groups: int) -> jax.Array:
    """int32 [T, K]: the K / G best experts of each group by `score` [T, E] (MoGE)."""
    tokens, num_experts = score.shape
    size = num_experts // num_groups
    best = jax.lax.top_k(score.reshape(tokens, num_groups, size), top_k // num_groups)[1]
    first = jnp.arange(num_groups, dtype=jnp.int32)[None, :, None] * size
    return (best.astype(jnp.int32) + first).reshape(tokens, top_k)


def with_weights(
    logits: jax.Array,
    score: jax.Array,
    idx: jax.Array,
    cfg: RouterConfig,
    *,
    mask: jax.Array | None = None,
) -> Routing:
    """The routing that takes the experts `idx` [T, K] with weights from `score` [T, E].

    An id of E (a recorded padded token) weighs nothing.
    """
    weights = jnp.take_along_axis(score, idx, axis=-1, mode="fill", fill_value=0.0)
    if cfg.renormalize:
        # Sigmoid scores can all underflow; softmax scores of a top-k cannot sum to zero.
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return _masked(logits, idx, weights * cfg.scaling_factor, cfg, mask)


def _masked(logits, idx, weights, cfg, mask):
    """The routing with padded tokens (False in `mask`) at no expert."""
    if mask is not None:
        idx = jnp.where(mask[:, None], idx, cfg.num_experts)
        weights = jnp.where(mask[:, None], weights, 0.0)
    return Routing(topk_idx=idx.astype(jnp.int32), topk_weights=weights, router_logits=logits)


def _allowed_groups(biased: jax.Array, cfg: RouterConfig) -> jax.Array:
    """bool [T, E]: the experts of each token's `top_groups` best groups."""
    tokens, size = biased.shape[0], cfg.num_experts // cfg.num_groups
    grouped = biased.reshape(tokens, cfg.num_groups, size)
    if cfg.group_score == "max":
        group_score = grouped.max(-1)
    else:
        group_score = jax.lax.top_k(grouped, 2)[0].sum(-1)
    best = jax.lax.top_k(group_score, cfg.top_groups)[1]  # [T, top_groups]
    chosen = (best[:, :, None] == jnp.arange(cfg.num_groups)[None, None]).any(1)  # [T, G]
    return jnp.repeat(chosen, size, axis=1)
