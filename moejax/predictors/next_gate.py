"""Next-gate look-ahead: the next layer's own router on this layer's gate input.

Residual streams change slowly from layer to layer, so the router that will be asked next already
knows most of its answer (Mixtral offloading, arXiv 2312.17238, section 3.2; Fate, arXiv
2502.12224). Nothing is fitted.

Axis letters:
    L  MoE layers    T  tokens    D  model dim    E  experts
"""

import jax

from moejax.predictors.features import multi_hot
from moejax.predictors.mlp import select
from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams, choose, router_logits
from moejax.routing.gates import scores as gate_scores


def scores(
    routers: RouterParams, layer: jax.Array | int, hidden: jax.Array, cfg: RouterConfig
) -> jax.Array:
    """float32 [T, E] for target `layer + 1` from hidden [T, D], the gate input of `layer`.

    `routers` has a leading [L]. Cost: T * D * E multiply-adds.
    """
    return own_scores(select(routers, layer + 1), hidden, cfg)


def own_scores(router: RouterParams, hidden: jax.Array, cfg: RouterConfig) -> jax.Array:
    """float32 [T, E] whose top k are what the gate `router` chooses for hidden [T, D].

    These are the logits where they alone decide. A correction bias acts on the scores after the
    softmax or sigmoid, and group-limited gates pass over experts of losing groups: there the
    chosen experts are lifted above the others and the rest keep their order.
    """
    logits = router_logits(router, hidden)
    if router.correction_bias is None and cfg.num_groups == 1:
        return logits
    score = gate_scores(logits, cfg)
    biased = score if router.correction_bias is None else score + router.correction_bias[None]
    if cfg.num_groups == 1:
        return biased
    lift = biased.max(-1, keepdims=True) - biased.min(-1, keepdims=True) + 1.0
    return biased + lift * multi_hot(choose(score, router.correction_bias, cfg), cfg.num_experts)
