"""Terms of the loss that make a model's experts easier to offload.

*Predictability*: the next layer's router, asked about this layer's gate input, is to name the
experts that it will choose (joint training of look-ahead, weight about 0.3). *Balance*: over the
whole batch by default, which leaves a sequence free to use few experts (arXiv 2501.11873; local
routing consistency, arXiv 2505.16056, section 5); over every sequence by itself for comparison.

Axis letters:
    L  MoE layers    B  sequences    S  positions    T  tokens, B * S    D  model dim    E  experts
    K  experts per token
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.models.decoder import Record
from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams, router_logits
from moejax.routing.losses import load_balancing_loss, routing_sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadingConfig:
    """What training does for offloading.

    Attributes:
        predictability_weight: of `predictability_loss`, 0 for none.
        balance_over: the tokens over which load is balanced.
    """

    predictability_weight: float = 0.0
    balance_over: Literal["batch", "sequence"] = "batch"

    def __post_init__(self):
        weight, over = self.predictability_weight, self.balance_over
        check(weight >= 0, f"predictability_weight={weight} must not be negative")
        check(over in ("batch", "sequence"), f"balance_over={over!r} is neither batch nor sequence")


def predictability_loss(record: Record, routers: RouterParams) -> jax.Array:
    """float32 []: nats of a chosen expert under the next gate; the mean over layers and tokens.

    `routers` have a leading [L]. What is to be predicted has no gradient. Cost: T * D * E
    multiply-adds for each layer but the last.
    """
    with jax.named_scope("predictability"):
        later = jax.tree.map(lambda leaf: leaf[1:], routers)
        logits = jax.vmap(router_logits)(later, record.hidden[:-1])  # [L - 1, T, E]
        picked = jnp.take_along_axis(logits, record.topk_idx[1:], axis=-1)
        return (jax.nn.logsumexp(logits, axis=-1)[..., None] - picked).mean()


def sequence_balance_loss(record: Record, cfg: RouterConfig, sequences: int) -> jax.Array:
    """float32 []: `load_balancing_loss` of every sequence by itself, averaged over them and layers.

    `sequences` is the B of the record's B * S tokens.
    """

    def split(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(leaf.shape[0] * sequences, -1, leaf.shape[-1])  # [L * B, S, ...]

    def one(topk_idx: jax.Array, topk_weights: jax.Array, logits: jax.Array) -> jax.Array:
        routing = Routing(topk_idx=topk_idx, topk_weights=topk_weights, router_logits=logits)
        return load_balancing_loss(routing_sums(routing, cfg))

    parts = record.topk_idx, record.topk_weights, record.router_logits
    return jax.vmap(one)(*map(split, parts)).mean()
