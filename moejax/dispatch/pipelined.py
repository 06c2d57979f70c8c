"""Any dispatch in chunks of tokens: collectives of one chunk can overlap the experts of another.

The pipelining degree of Tutel and FSMoE (arXiv 2501.10714, section 4), the nano-batches of NanoFlow
(arXiv 2408.12757). The chunks are independent, so the compiler's scheduler is free to interleave
them.

Axis letters:
    T  tokens of this rank    K  experts per token    D  model dim
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.dispatch.ranks import local_choices
from moejax.experts.stage import Stage, StageCounts


def pipelined(stage: Stage, *, num_chunks: int) -> Stage:
    """The stage that runs `stage` on `num_chunks` equal chunks of this rank's tokens.

    Without drops the result is that of `stage` alone, rows being independent; a capacity is per
    chunk. Counts are summed, waves too. A stage with a state passes it from chunk to chunk, which
    orders them. Raises `InputError` when T does not divide. Cost: that of `stage` in `num_chunks`
    times the messages; weights are read `num_chunks` times.
    """
    check(num_chunks >= 1, f"num_chunks={num_chunks} must be at least 1")

    def chunked(
        x: jax.Array, routing: Routing, weights: Any, layer: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, StageCounts]:
        tokens = x.shape[0]
        check(
            tokens % num_chunks == 0,
            f"{tokens} tokens of a rank are not divisible by num_chunks={num_chunks}",
        )
        size = tokens // num_chunks
        outputs, counts = [], []
        for i in range(num_chunks):
            with jax.named_scope(f"moe_chunk_{i}"):
                rows, idx, topk_weights = (
                    leaf[i * size : (i + 1) * size]
                    for leaf in (x, routing.topk_idx, routing.topk_weights)
                )
                choices = local_choices(routing, idx, topk_weights)
                y, state, count = stage(rows, choices, weights, layer, state)
            outputs.append(y)
            counts.append(count)
        total = functools.reduce(functools.partial(jax.tree.map, jnp.add), counts)
        return jnp.concatenate(outputs), state, total

    return chunked
