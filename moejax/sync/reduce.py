"""Sums over workers, plain and coded, and what of a worker's part was really sent.

Letters:
    W  workers    n  elements
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moejax.collectives.builders import direct_all_reduce, ring_all_gather
from moejax.collectives.codecs import TopK, TwoBit
from moejax.collectives.compose import with_codec
from moejax.collectives.feedback import OverlapWeight, gathered_sum, project
from moejax.collectives.flat import all_reduce
from moejax.collectives.schedule import Codec

# float32 [n] to its sum over workers and what this worker's part of it was, both [n].
Reducer = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def plain_sum(axes: tuple[str, ...]) -> Reducer:
    """The compiler's all-reduce."""

    def reduce(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return lax.pcast(lax.psum(x, axes), axes, to="varying"), x

    return reduce


def coded_sum(
    axes: tuple[str, ...], codec: Codec | None, overlap: OverlapWeight | None = None
) -> Reducer:
    """An all-reduce whose messages are all coded; the same bits on all workers.

    Codes whose sums have short codes too (bfloat16, blocks) are reduced chunk by chunk, 2 (W - 1)
    of W chunks sent per worker; sparse and two-bit ones are gathered, W - 1 whole codes.
    """
    if codec is None:
        return plain_sum(axes)

    def reduce(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        sizes = {axis: lax.axis_size(axis) for axis in axes}
        if isinstance(codec, TopK | TwoBit):
            gather = ring_all_gather(sizes)
            return gathered_sum(x, codec, gather, overlap), project(codec, x)
        schedule = with_codec(direct_all_reduce(sizes), codec)
        rows = schedule.num_ranks
        padded = jnp.pad(x, (0, -x.size % rows))
        return all_reduce(schedule, padded)[: x.size], project(codec, padded, rows)[: x.size]

    return reduce


def sent_bytes(n: int, workers: int, codec: Codec | None = None) -> float:
    """Bytes that each worker sends for one sum of n float32, padding of chunks included.

    Of a plain sum, those of the best algorithm.
    """
    if codec is None:
        return 2 * (workers - 1) / workers * 4 * n
    if isinstance(codec, TopK | TwoBit):
        return (workers - 1) * codec.nbytes(n, 4)
    return 2 * (workers - 1) * codec.nbytes(-(-n // workers), 4)
