"""Token-choice gates: softmax or sigmoid scores, bias, groups, top-k.

The router runs in float32 whatever the model's dtype. Ties go to the lower expert id.

Axis letters:
    T  tokens    D  model dim    E  experts    K  experts per token    G  routing groups
"""

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.structs import Routing
from moejax.routing.config import RouterConfig


@struct.dataclass(kw_only=True)
class RouterParams:
    """Weights of a gate, always float32."""

    w_router: jax.Array  # [D, E]
    correction_bias: jax.Array | None = None  # [E], None without `cfg.correction_bias`


def init_router(key: jax.Array, d_model: int, cfg: RouterConfig) -> RouterParams:
    """Normal weights of variance 1 / d_model and a zero bias."""
    w_router = jax.random.normal(key, (d_model, cfg.num_experts), jnp.float32) * d_model**-0.5
    bias = jnp.zeros((cfg.num_experts,), jnp.float32) if cfg.correction_bias else None
    return RouterParams(w_router=w_router, correction_bias=bias)


def router_logits(params: RouterParams, x: jax.Array) -> jax.Array:
    """float32 [T, E] logits of x [T, D]."""
    return x.astype(jnp.float32) @ params.w_router


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
        score = scores(logits, cfg)
        idx = choose(score, params.correction_bias, cfg) if forced_idx is None else forced_idx
        return with_weights(logits, score, idx, cfg, mask=mask)


def choose(score: jax.Array, correction_bias: jax.Array | None, cfg: RouterConfig) -> jax.Array:
    """int32 [T, K] ids of the chosen experts, best first."""
    biased = score if correction_bias is None else score + correction_bias[None]
    if cfg.num_groups > 1:
        biased = jnp.where(_allowed_groups(biased, cfg), biased, -jnp.inf)
    return jax.lax.top_k(biased, cfg.top_k)[1]


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
    weights = weights * cfg.scaling_factor
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
