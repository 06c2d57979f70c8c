"""Precision by router weight: a missing expert that matters little travels in few bits. Lossy.

The rule of HOBBIT (arXiv 2411.01433) for every token: of the experts it chose, sorted by weight,
the i-th is as unimportant as the share of weight before it,

    s_i = sum over j < i of w_j / sum over all j of w_j

and important where s_i <= threshold: a token's first expert always, from a threshold of 0 on. An
expert is important to a call if it is so to any of its tokens. Only misses lose precision, and what
has landed in few bits is fetched in full as soon as a call finds it important. HOBBIT's second
threshold, past which experts are skipped, is not here.

Axis letters:
    T  tokens    K  experts per token    L  MoE layers    E  experts
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.core.memory import nbytes
from moejax.core.ram import check_host_memory
from moejax.experts.quantize import abstract_quantized, quantize_experts
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.quantized import Format, is_quantized


@struct.dataclass(kw_only=True)
class TwoPrecisions:
    """A host store of the same experts twice; made by `in_two_precisions`."""

    full: GatedWeights  # [L, E, ...]
    low: GatedWeights  # the same with `Quantized` matrices


def in_two_precisions(experts: GatedWeights, format: Format) -> TwoPrecisions:
    """The `experts` [L, E, ...] and, beside them in the same memory, a copy of them in `format`.

    Raises `InputError` for experts that are quantised already, where host memory has no room for
    the copy, and as `quantize_experts` does. Cost: that of `quantize_experts`.
    """
    check(not is_quantized(experts), "experts in two precisions want full ones, not quantised ones")
    copy: Any = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), experts
    )
    check_host_memory(nbytes(abstract_quantized(copy, format)), f"the experts in {format}")
    return TwoPrecisions(full=experts, low=quantize_experts(experts, format))


def important_experts(
    topk_idx: jax.Array, topk_weights: jax.Array, threshold: float, num_experts: int
) -> jax.Array:
    """bool [E]: the experts that some token of the call finds important.

    Args: `topk_idx` int32 [T, K], ids past E are no expert; `topk_weights` float32 [T, K], not
    negative, in any order. Of equal weights the one that stands first counts as larger. All chosen
    experts are important from a threshold of 1 on, none below 0. `InputError` for one expert per
    token, which no weight beside it makes unimportant.
    """
    top_k = topk_idx.shape[1]
    check(top_k > 1, f"top_k={top_k}: the only expert of a token is never unimportant")
    ours, others = topk_weights[:, :, None], topk_weights[:, None, :]
    position = jnp.arange(top_k)
    stands_first = (position[:, None] > position[None])[None]
    before = (others > ours) | ((others == ours) & stands_first)  # [T, K, K]
    share = jnp.sum(jnp.where(before, others, 0.0), axis=2)
    total = jnp.sum(topk_weights, axis=1, keepdims=True)
    # Rounding must not lift a share over 1, nor weights of zero make it NaN.
    share = jnp.where(total > 0, jnp.minimum(share / total, 1.0), 0.0)
    important = (share <= threshold)[:, :, None]
    expert = jnp.arange(num_experts, dtype=jnp.int32)
    return jnp.any((topk_idx[:, :, None] == expert[None, None]) & important, axis=(0, 1))
