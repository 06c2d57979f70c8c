"""Experts in column parts: what link, host and cache handle is a slice of an expert's hidden units.

An expert is a sum over its hidden units, so C slices of F / C units are C experts that every row of
it goes to: `E * C` experts of hidden dim F / C, `K * C` per token. Nothing else changes. A miss is
then divided between link and host to 1 / C of an expert (the shares beta and gamma of ScheInfer,
arXiv 2411.15715), and the cache may hold a part of one (its alpha). Whole experts leave the busier
of link and host waiting for up to one of them; parts for 1 / C of that.

The parts' partial sums are added at the end: outputs agree with whole experts to rounding, not to
the bit.

Axis letters:
    T  tokens    K  experts per token    E  experts    C  parts    D  model dim    F  hidden dim
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.experts.stage import Stage
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.quantized import is_quantized
from moejax.offload.prefetch import Scorer


def split_columns(experts: GatedWeights, parts: int) -> GatedWeights:
    """Experts [L, E, ...] as [L, E * C, ...] of hidden dim F / C; part c of expert e is e * C + c.

    Works on numpy arrays as well, for stacks that go straight to the host. Cost: a copy of the
    stack. `InputError` unless C divides F, and for quantised stacks.
    """
    d_ff = experts.w_gate.shape[-1]
    check(parts >= 1 and d_ff % parts == 0, f"{parts} column parts do not divide d_ff={d_ff}")
    check(not is_quantized(experts), "quantised experts cannot be split by columns")
    if parts == 1:
        return experts
    width = d_ff // parts
    biases: dict[str, Any] = {}
    if experts.b_gate is not None:
        assert experts.b_up is not None and experts.b_down is not None
        biases = dict(
            b_gate=_fold(experts.b_gate, (parts, width), 0),
            b_up=_fold(experts.b_up, (parts, width), 0),
            b_down=_once(experts.b_down, parts),
        )
    return dataclasses.replace(
        experts,
        w_gate=_fold(experts.w_gate, (experts.w_gate.shape[2], parts, width), 1),
        w_up=_fold(experts.w_up, (experts.w_up.shape[2], parts, width), 1),
        w_down=_fold(experts.w_down, (parts, width, experts.w_down.shape[3]), 0),
        **biases,
    )


def split_routing(routing: Routing, parts: int) -> Routing:
    """`routing` [T, K] to all parts of every chosen expert, [T, K * C]; absent ids stay too big."""
    tokens, top_k = routing.topk_idx.shape
    part = jnp.arange(parts, dtype=jnp.int32)
    idx = routing.topk_idx[:, :, None] * parts + part[None, None]
    return dataclasses.replace(
        routing,
        topk_idx=idx.reshape(tokens, top_k * parts),
        topk_weights=jnp.repeat(routing.topk_weights, parts, axis=1),
        router_logits=jnp.repeat(routing.router_logits, parts, axis=1),
    )


def by_columns(stage: Stage, parts: int) -> Stage:
    """A stage over experts split by `split_columns`, for callers that route to whole ones.

    Lookups, hits and transfers count parts.
    """
    if parts == 1:
        return stage

    def run(x, routing, weights, layer, state):
        tokens, top_k = routing.topk_idx.shape
        y, state, counts = stage(x, split_routing(routing, parts), weights, layer, state)
        y = y.reshape(tokens, top_k, parts, -1).astype(jnp.float32)
        return jnp.sum(y, axis=2).astype(x.dtype), state, counts

    return run


def score_columns(scorer: Scorer | None, parts: int) -> Scorer | None:
    """`scorer` of whole experts, asked for parts: all parts of an expert score alike."""
    if scorer is None or parts == 1:
        return scorer

    def ask(x, routing, layer, state):
        whole = dataclasses.replace(
            routing,
            topk_idx=routing.topk_idx[:, ::parts] // parts,
            topk_weights=routing.topk_weights[:, ::parts],
            router_logits=routing.router_logits[:, ::parts],
        )
        scores, state = scorer(x, whole, layer, state)
        return jnp.repeat(scores, parts, axis=1), state

    return ask


def _fold(leaf: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """[L, E, ...] with the axes behind E of `shape` and the parts at `axis` -> [L, E * C, ...]."""
    layers, experts = leaf.shape[:2]
    folded = leaf.reshape(layers, experts, *shape)
    order = [2 + axis, *(2 + i for i in range(len(shape)) if i != axis)]
    folded = folded.transpose(0, 1, *order)
    return folded.reshape(layers, experts * shape[axis], *folded.shape[3:])


def _once(bias: jax.Array, parts: int) -> jax.Array:
    """The bias of the sum [L, E, D] as that of parts [L, E * C, D]: the first one's alone."""
    layers, experts, d = bias.shape
    first = np.arange(parts)[:, None] == 0
    return (bias[:, :, None] * first.astype(bias.dtype)[None, None]).reshape(layers, -1, d)
