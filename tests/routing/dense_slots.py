"""Expert choice and Soft MoE of one group, every expert on every token: the oracle of slots."""

import jax
import jax.numpy as jnp

from moejax.experts.gated import gated_mlp
from moejax.routing.config import ExpertChoiceConfig, SlotConfig


def dense_slots(params, x: jax.Array, mask: jax.Array, cfg: SlotConfig) -> jax.Array:
    """[T, D] of x [T, D]; differentiable, without gather, scatter or top-k."""
    if isinstance(cfg, ExpertChoiceConfig):
        score = jax.nn.softmax(x @ params.router.w_router, axis=1)
        per_expert = (score.T, params.experts)

        def serve(one):
            mine, expert = one
            weight = jnp.where(taken(mine, mask, cfg.slots(x.shape[0])), mine, 0.0)
            return weight[:, None] * gated_mlp(expert, x)

        return jax.vmap(serve)(per_expert).sum(0)
    w_router = params.router.w_router
    logits = params.router.scale * jnp.einsum("td,dec->tec", unit(x, 1), unit(w_router, 0))
    amount = jnp.where(mask[:, None, None], jnp.exp(logits), 0.0)
    shares = amount / jnp.maximum(amount.sum((1, 2), keepdims=True), 1e-20)

    def mix(one):
        amount, shares, expert = one  # [T, C] of this expert
        slots = amount.T @ x / jnp.maximum(amount.sum(0), 1e-20)[:, None]
        return shares @ gated_mlp(expert, slots)

    return jax.vmap(mix)(
        (jnp.moveaxis(amount, 1, 0), jnp.moveaxis(shares, 1, 0), params.experts)
    ).sum(0)


def taken(score: jax.Array, mask: jax.Array, capacity: int) -> jax.Array:
    """bool [T]: valid tokens with fewer than `capacity` valid ones better, or equal and earlier."""
    earlier = jnp.tri(score.shape[0], k=-1, dtype=bool)
    ahead = (score[None] > score[:, None]) | ((score[None] == score[:, None]) & earlier)
    return mask & ((ahead & mask[None]).sum(1) < capacity)


def unit(v: jax.Array, axis: int) -> jax.Array:
    return v / jnp.sqrt(jnp.sum(v * v, axis=axis, keepdims=True))
