"""What a codec leaves out, kept and sent later; and sums of what all ranks kept.

Error feedback (Seide et al. 2014; arXiv 1901.09847) adds the residual of the last step before
coding. The result is what the codec makes of it, and since a codec is a projection, a collective
that codes the same rows again sends exactly this.

Letters:
    R  ranks    M  rows    n  elements of a row
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from moejax.collectives.lower import run_schedule
from moejax.collectives.schedule import Codec, Schedule
from moejax.core.errors import check


@struct.dataclass(kw_only=True)
class FeedbackState:
    """What has not been sent yet, a leaf per parameter."""

    residual: Any


def project(codec: Codec, x: jax.Array, rows: int = 1) -> jax.Array:
    """x as all will read it after the codec, coded as `rows` equal rows of its elements."""
    check(
        x.size % rows == 0,
        f"an array of {x.size} elements has no {rows} equal rows",
    )
    flat = x.reshape(rows, -1)
    return codec.decode(codec.encode(flat), flat.shape[1], x.dtype).reshape(x.shape)


def error_feedback(codec: Codec) -> optax.GradientTransformation:
    """Updates to what the codec makes of them and of the residual, each leaf one row.

    The state is a tree like the parameters; it is this rank's own, so shard it by rank.
    """

    def init(params: Any) -> Any:
        return FeedbackState(residual=jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        wanted = jax.tree.map(jnp.add, updates, state.residual)
        sent = jax.tree.map(lambda leaf: project(codec, leaf), wanted)
        return sent, FeedbackState(residual=jax.tree.map(jnp.subtract, wanted, sent))

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class OverlapWeight:
    """OPWA (arXiv 2408.14736): elements that few ranks kept count for more.

    Where at most `few` ranks sent an element, the sum is multiplied by `gain`. The paper's text
    gives no values; `few=1, gain=2.0` is a start.
    """

    few: int = 1
    gain: float = 2.0


def gathered_sum(
    x: jax.Array, codec: Codec, gather: Schedule, overlap: OverlapWeight | None = None
) -> jax.Array:
    """Sum over ranks of x [...], each rank's coded once and sent whole; inside `shard_map`.

    For codes whose sums have no short code, such as `TopK`. All ranks decode the same codes in the
    same order, their own too, and agree to the bit. Cost: R - 1 codes sent per rank by `gather`,
    an all-gather with one chunk per rank, and R decoded.
    """
    ranks = gather.num_ranks
    check(len(gather.start[0]) == 1 and gather.num_chunks == ranks, "gather wants a chunk per rank")
    wire = codec.encode(x.reshape(1, -1))
    wires = run_schedule(gather, wire)[0]
    rows = codec.decode(wires, x.size, x.dtype)  # [R, n]
    total = rows.sum(0)
    if overlap is not None:
        senders = (rows != 0).sum(0)
        total = jnp.where(senders <= overlap.few, overlap.gain, 1.0).astype(x.dtype) * total
    return total.reshape(x.shape)
