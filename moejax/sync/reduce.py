"""Sums over workers, plain and coded, and what of a worker's part was really sent.

Letters:
    W  workers    n  elements
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moejax.collectives.builders import ring_all_gather, shifted_all_to_all
from moejax.collectives.codecs import TwoBit
from moejax.collectives.compose import with_codec
from moejax.collectives.feedback import project
from moejax.collectives.lower import run_schedule
from moejax.collectives.schedule import Codec

# float32 [n] to its sum over workers and what this worker's part of it was, both [n].
Reducer = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def plain_sum(axes: tuple[str, ...]) -> Reducer:
    """The compiler's all-reduce."""

    def reduce(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return lax.pcast(lax.psum(x, axes), axes, to="varying"), x

    return reduce


def coded_sum(axes: tuple[str, ...], codec: Codec | None) -> Reducer:
    """An all-reduce whose messages are all coded; the same bits on all workers.

    Each worker owns a chunk: the others send it theirs, it sums and sends the sum round, coded
    again. What the second code leaves out of a chunk counts as not sent by its owner, so that the
    sum of what was sent is what all get, and with feedback nothing is lost (DoubleSqueeze, arXiv
    1905.05957). Cost: 2 (W - 1) coded chunks sent per worker, W decoded.
    """
    if codec is None:
        return plain_sum(axes)

    def reduce(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        sizes = {axis: lax.axis_size(axis) for axis in axes}
        workers = math.prod(sizes.values())
        rows = jnp.pad(x, (0, -x.size % workers)).reshape(workers, -1)
        arrived = run_schedule(with_codec(shifted_all_to_all(sizes), codec), rows)[0]
        chunk = arrived.sum(0, keepdims=True)
        gather = with_codec(ring_all_gather(sizes), of_sum(codec, workers))
        total = run_schedule(gather, chunk)[0]
        mine = (jnp.arange(workers) == lax.axis_index(axes))[:, None]
        sent = jnp.where(mine, rows - (chunk - total), project(codec, rows, workers))
        return total.reshape(-1)[: x.size], sent.reshape(-1)[: x.size]

    return reduce


def of_sum(codec: Codec, workers: int) -> Codec:
    """What codes a sum of so many codes: of two bits, those of the mean."""
    return TwoBit(codec.threshold * workers) if isinstance(codec, TwoBit) else codec


def sent_bytes(n: int, workers: int, codec: Codec | None = None) -> float:
    """Bytes that each worker sends for one sum of n float32, padding of chunks included.

    Of a plain sum, those of the best algorithm.
    """
    if codec is None:
        return 2 * (workers - 1) / workers * 4 * n
    return 2 * (workers - 1) * codec.nbytes(-(-n // workers), 4)
