"""What one evaluation of a predictor costs: bytes it holds, operations, microseconds on this CPU.

Axis letters:
    L  MoE layers    T  tokens    D  model dim    E  experts    K  experts per token
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core.memory import nbytes
from moejax.core.structs import Routing
from moejax.models.config import DecoderConfig
from moejax.predictors import history, path, pre_attention, scorers
from moejax.routing.gates import RouterParams

_REPEATS, _TRIALS = 40, 7


def costs(
    fitted: dict[str, Any], routers: RouterParams, model: DecoderConfig
) -> dict[str, dict[str, float]]:
    """By predictor: `bytes` of its own, and for one token `flops` and `us` of one layer's scores.

    `us` is the least of several passes over all layers inside one compiled loop, one token at a
    time; dense products only are counted as operations.
    """
    router = model.moe.router
    asks = {
        "llapor": (scorers.llapor_scorer, (fitted["llapor"],)),
        "residual": (partial(scorers.residual_scorer, cfg=router), (fitted["residual"], routers)),
        "history": (scorers.history_scorer, (fitted["history"],)),
        "next_gate": (partial(scorers.next_gate_scorer, cfg=router), (routers,)),
        "path": (scorers.path_scorer, (fitted["path"],)),
    }
    states = {
        "history": history.init_state(fitted["history"], 1),
        "path": path.init_path_state(fitted["path"], 1),
    }
    result = {}
    for name, (make, params) in asks.items():
        us = _microseconds(make, params, states.get(name), model)
        own = 0 if name == "next_gate" else nbytes(fitted[name])
        result[name] = {"bytes": own, "flops": _flops(name, fitted, model), "us": us}
    own = nbytes(fitted["pre_attention"])
    us = _microseconds(_pre_attention_scorer, (fitted["pre_attention"],), None, model)
    result["pre_attention"] = {
        "bytes": own,
        "flops": _flops("pre_attention", fitted, model),
        "us": us,
    }
    return result


def _pre_attention_scorer(params: pre_attention.PreAttentionParams):
    def score(x, routing, layer, state):
        return pre_attention.scores(params, layer, x), state

    return score


def _microseconds(
    make: Callable[..., Any], params: tuple, state: Any, model: DecoderConfig
) -> float:
    layers, top_k = model.num_moe_layers - 1, model.moe.router.top_k

    @jax.jit
    def passes(params: tuple, x: jax.Array, state: Any) -> jax.Array:
        scorer = make(*params)

        def one(carry: tuple, layer: jax.Array) -> tuple:
            x, state = carry
            experts = jnp.arange(top_k, dtype=jnp.int32)[None] + layer
            routing = Routing(
                topk_idx=experts,
                topk_weights=jnp.ones((1, top_k)),
                router_logits=jnp.zeros((1, model.moe.router.num_experts)),
            )
            scores, state = scorer(x, routing, layer, state)
            # The next evaluation depends on this one, so none is left out.
            return (x + 1e-9 * scores.sum(), state), None

        order = jnp.tile(jnp.arange(layers, dtype=jnp.int32), _REPEATS)
        return jax.lax.scan(one, (x, state), order)[0][0]

    x = jnp.ones((1, model.d_model))
    passes(params, x, state).block_until_ready()
    times = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        passes(params, x, state).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times) / (_REPEATS * layers) * 1e6


def _flops(name: str, fitted: dict[str, Any], model: DecoderConfig) -> float:
    """Mean over the layers that predict, of one token."""
    d, e, layers = model.d_model, model.moe.num_experts, model.num_moe_layers - 1
    if name == "next_gate":
        return 2.0 * d * e
    params = fitted[name]
    if name == "residual":
        return 2 * d * e + _matrices(params) / layers
    if name == "history":
        net = params.net
        shared = 2 * (net.reader.w_in.size + net.reader.w_out.size)
        opened = 2 * (net.choice.size * net.past.shape[0] + net.past.size) / layers
        return shared + 2 * net.target.w_out.size / (layers + 1) + opened
    if name == "path":
        encoder = params.encoder
        dense = encoder.filters.size + encoder.w_in.size + encoder.w_block.size
        return 2 * dense / layers + 2 * params.w_out.size / (layers + 1)
    return _matrices(params) / (layers + 1 if name == "pre_attention" else layers)


def _matrices(params: Any) -> float:
    """Operations of one token through every matrix of a tree of stacked layers."""
    return float(sum(2 * leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 3))
