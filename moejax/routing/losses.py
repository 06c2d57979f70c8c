"""Auxiliary losses and statistics of one layer's routing.

Both losses are per layer; a model averages them over its MoE layers. (Hugging Face's
`load_balancing_loss_func` pools the tokens of all layers before the product instead, which lets one
layer's imbalance hide another's.) With `axes`, the mesh axes that tokens are sharded over inside
`shard_map`, they are those of all tokens, the same on every rank (arXiv 2501.11873).

Axis letters:
    T  tokens    E  experts    K  experts per token
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.structs import Routing
from moejax.routing.config import RouterConfig
from moejax.routing.gates import scores

T = TypeVar("T")


def expert_load(routing: Routing, num_experts: int, axes: tuple[str, ...] = ()) -> jax.Array:
    """int32 [E]: assignments per expert; padded tokens count nowhere."""
    flat = routing.topk_idx.reshape(-1)
    load = (flat[:, None] == jnp.arange(num_experts)[None]).sum(0, dtype=jnp.int32)
    return _total(load, axes)


def valid_tokens(routing: Routing, num_experts: int) -> jax.Array:
    """bool [T]: False for padding."""
    # Not column 0 alone: a slice of its result keeps XLA:CPU from compiling `top_k` as one.
    return jnp.all(routing.topk_idx < num_experts, axis=1)


@struct.dataclass(kw_only=True)
class RoutingSums:
    """What both losses are made of: sums over the valid tokens of all ranks."""

    load: jax.Array  # int32 [E], assignments
    tokens: jax.Array  # int32 []
    share: jax.Array  # float32 [E], of each token's scores
    squared_z: jax.Array  # float32 [], squared log-partition of the logits


def routing_sums(routing: Routing, cfg: RouterConfig, axes: tuple[str, ...] = ()) -> RoutingSums:
    """The sums of one layer's routing. Cost: with `axes`, one all-reduce of 2 E + 2 words."""
    valid = valid_tokens(routing, cfg.num_experts)
    share = scores(routing.router_logits, cfg)
    if cfg.score == "sigmoid":
        share = share / (share.sum(-1, keepdims=True) + 1e-20)
    z = jax.nn.logsumexp(routing.router_logits, axis=-1)
    sums = RoutingSums(
        load=expert_load(routing, cfg.num_experts),
        tokens=valid.sum(dtype=jnp.int32),
        share=jnp.where(valid[:, None], share, 0.0).sum(0),
        squared_z=jnp.where(valid, jnp.square(z), 0.0).sum(),
    )
    return _total(sums, axes)


def load_balancing_loss(sums: RoutingSums) -> jax.Array:
    """`E * sum_e f_e p_e`, 1.0 when balanced (Switch, arXiv 2101.03961, eq. 4).

    f_e is the fraction of assignments that expert e received (no gradient), p_e its mean share of
    the scores over valid tokens.
    """
    load = sums.load.astype(jnp.float32)
    fraction = load / jnp.maximum(load.sum(), 1.0)
    mean_share = sums.share / jnp.maximum(sums.tokens, 1).astype(jnp.float32)
    return load.shape[0] * jnp.sum(fraction * mean_share)


def router_z_loss(sums: RoutingSums) -> jax.Array:
    """Mean squared log-partition of the logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return sums.squared_z / jnp.maximum(sums.tokens, 1).astype(jnp.float32)


def load_imbalance(load: jax.Array) -> jax.Array:
    """Busiest expert over the mean, along the last axis of an int load [..., E]; 1.0 is even."""
    load = load.astype(jnp.float32)
    return load.max(-1) / jnp.maximum(load.mean(-1), 1e-9)


def _total(x: T, axes: tuple[str, ...]) -> T:
    return jax.lax.psum(x, axes) if axes else x
