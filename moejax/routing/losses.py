"""Auxiliary losses and statistics of one layer's routing.

Both losses are per layer; a model averages them over its MoE layers. (Hugging Face's
`load_balancing_loss_func` pools the tokens of all layers before the product instead, which lets one
layer's imbalance hide another's.) With `axes`, the mesh axes that tokens are sharded over inside
`shard_map`, they are those of all tokens, the same on every rank (arXiv 2501.11873).

Axis letters:
    T  tokens    E  experts    K  experts per token
"""

import jax
import jax.numpy as jnp

from moejax.core.structs import Routing
from moejax.routing.config import RouterConfig
from moejax.routing.gates import scores


def expert_load(routing: Routing, num_experts: int, axes: tuple[str, ...] = ()) -> jax.Array:
    """int32 [E]: assignments per expert; padded tokens count nowhere."""
    flat = routing.topk_idx.reshape(-1)
    load = (flat[:, None] == jnp.arange(num_experts)[None]).sum(0, dtype=jnp.int32)
    return _total(load, axes)


def valid_tokens(routing: Routing, num_experts: int) -> jax.Array:
    """bool [T]: False for padding."""
    # Not column 0 alone: a slice of its result keeps XLA:CPU from compiling `top_k` as one.
    return jnp.all(routing.topk_idx < num_experts, axis=1)


def load_balancing_loss(
    routing: Routing, cfg: RouterConfig, axes: tuple[str, ...] = ()
) -> jax.Array:
    """`E * sum_e f_e p_e`, 1.0 when balanced (Switch, arXiv 2101.03961, eq. 4).

    f_e is the fraction of assignments that expert e received (no gradient), p_e its mean share of
    the scores over valid tokens.
    """
    valid = valid_tokens(routing, cfg.num_experts)
    share = scores(routing.router_logits, cfg)
    if cfg.score == "sigmoid":
        share = share / (share.sum(-1, keepdims=True) + 1e-20)
    load = expert_load(routing, cfg.num_experts, axes).astype(jnp.float32)
    fraction = jax.lax.stop_gradient(load / jnp.maximum(load.sum(), 1.0))
    return cfg.num_experts * jnp.sum(fraction * _masked_mean(share, valid, axes))


def router_z_loss(routing: Routing, num_experts: int, axes: tuple[str, ...] = ()) -> jax.Array:
    """Mean squared log-partition of the logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    z = jax.nn.logsumexp(routing.router_logits, axis=-1)
    return _masked_mean(jnp.square(z)[:, None], valid_tokens(routing, num_experts), axes)[0]


def load_imbalance(load: jax.Array) -> jax.Array:
    """Busiest expert over the mean, along the last axis of an int load [..., E]; 1.0 is even."""
    load = load.astype(jnp.float32)
    return load.max(-1) / jnp.maximum(load.mean(-1), 1e-9)


def _masked_mean(x: jax.Array, valid: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    total = _total(jnp.where(valid[:, None], x, 0.0).sum(0), axes)
    return total / jnp.maximum(_total(valid.sum(), axes), 1).astype(x.dtype)


def _total(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x
