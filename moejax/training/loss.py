"""Next-token cross entropy plus the routers' auxiliary losses, averaged over layers.

Axis letters:
    B  batch    S  positions    V  vocabulary    L  MoE layers    E  experts
"""

import jax
import jax.numpy as jnp
from flax import struct

from moejax.experts.stage import Stage, resident
from moejax.layers.parallel import ALONE, Parallel
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams, forward
from moejax.models.experts import stack_moe
from moejax.training.config import TrainConfig
from moejax.training.offloading import predictability_loss, sequence_balance_loss


@struct.dataclass(kw_only=True)
class LossMetrics:
    """The terms of the loss, unweighted, and where the tokens went."""

    cross_entropy: jax.Array  # float32 [], nats per token
    load_balancing_loss: jax.Array  # float32 [], 1.0 when balanced
    router_z_loss: jax.Array  # float32 []
    predictability_loss: jax.Array  # float32 [], nats of a chosen expert; 0 without a weight
    expert_load: jax.Array  # int32 [L, E]
    assignments_dropped: jax.Array  # int32 [], of all layers


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32 [B, S] nats of targets int32 [B, S] under logits float32 [B, S, V]."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def train_loss(
    params: DecoderParams,
    tokens: jax.Array,
    model: DecoderConfig,
    cfg: TrainConfig,
    *,
    stage: Stage = resident,
    parallel: Parallel = ALONE,
) -> tuple[jax.Array, LossMetrics]:
    """The loss of predicting tokens int32 [B, S + 1] from the ones before.

    `parallel`: how arrays are split, when inside `shard_map`; the loss and the metrics are those of
    the whole batch, the same on every rank.
    """
    output = forward(params, tokens[:, :-1], model, stage=stage, parallel=parallel)
    axes, terms = parallel.token_axes, cfg.offloading

    def mean(x: jax.Array) -> jax.Array:
        return jax.lax.pmean(x, axes) if axes else x

    balance, foreseen = output.metrics.load_balancing_loss.mean(), jnp.float32(0)
    if terms.balance_over == "sequence":
        router, sequences = model.moe.router, len(tokens)
        balance = mean(sequence_balance_loss(output.record, router, sequences))
    if terms.predictability_weight:
        routers = stack_moe(params, model, lambda moe: moe.router)
        foreseen = mean(predictability_loss(output.record, routers))
    metrics = LossMetrics(
        cross_entropy=mean(cross_entropy(output.logits, tokens[:, 1:]).mean()),
        load_balancing_loss=balance,
        predictability_loss=foreseen,
        router_z_loss=output.metrics.router_z_loss.mean(),
        expert_load=output.metrics.expert_load,
        assignments_dropped=output.metrics.assignments_dropped.sum(),
    )
    loss = (
        metrics.cross_entropy
        + cfg.load_balancing_weight * metrics.load_balancing_loss
        + cfg.router_z_weight * metrics.router_z_loss
        + terms.predictability_weight * metrics.predictability_loss
    )
    return loss, metrics
