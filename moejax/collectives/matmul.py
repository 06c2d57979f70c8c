"""Products beside their collectives: with gathered rows, and of partial sums that are scattered.

`all_gather(x) @ w` waits for all rows, `psum_scatter(x @ w)` for all products. With a schedule,
each step's rows are multiplied while others travel (Wang et al., ASPLOS 2023, "Overlap
communication with dependent computation via decomposition"): the compute hooks of
`collectives.lower` and nothing else.

Letters:
    R  ranks    c  rows of a rank    D  elements of a row    F  columns of the weights
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moejax.collectives.lower import arrived_chunks, run_schedule
from moejax.collectives.schedule import Schedule
from moejax.core.errors import check


def all_gather_matmul(x: jax.Array, w: jax.Array, schedule: Schedule) -> jax.Array:
    """[R * c, F]: x [c, D] of all ranks, in their order, times w [D, F]; inside `shard_map`.

    Args:
        schedule: an all-gather of one chunk per rank, such as `ring_all_gather`.

    Differentiable. Cost: R products of c rows, R - 1 of them behind permutes, and a copy of the
    result, because ranks receive in different orders.
    """
    ranks = schedule.num_ranks
    gathers = all(chunks == (rank,) for rank, chunks in enumerate(schedule.start))
    check(gathers and schedule.num_chunks == ranks, "the schedule starts with chunk r on rank r")
    check(x.ndim == 2 and w.ndim == 2, f"want x [c, D] and w [D, F], got {x.shape} and {w.shape}")

    def multiply(step: int, arrived: jax.Array, products: list[jax.Array]) -> list[jax.Array]:
        # One product per chunk: a batch of them would wait for its last.
        return [*products, *(chunk @ w for chunk in arrived)]

    with jax.named_scope("all_gather_matmul"):
        _, products = run_schedule(schedule, x[None], hook=multiply, carry=[x @ w])
        mine = lax.dynamic_index_in_dim(_places(schedule), lax.axis_index(schedule.axes), 0, False)
        blocks = jnp.stack(products).at[mine].get(mode="promise_in_bounds", unique_indices=True)
    return blocks.reshape(ranks * x.shape[0], w.shape[1])


def matmul_reduce_scatter(x: jax.Array, w: jax.Array, schedule: Schedule) -> jax.Array:
    """[c, F]: this rank's rows of the sum over ranks of x [R * c, D] times w [D, F].

    For use inside `shard_map`, where D is split over the ranks.

    Args:
        schedule: a reduce-scatter of one chunk per rank, such as `ring_reduce_scatter`.

    Differentiable. Sums in the dtype of the products. Cost: R products of c rows, all but the first
    beside permutes, and a copy of x, because ranks begin with different chunks.
    """
    ranks = schedule.num_ranks
    scatters = all(chunks == (rank,) for rank, chunks in enumerate(schedule.end))
    check(scatters and schedule.num_chunks == ranks, "the schedule ends with chunk r on rank r")
    check(x.ndim == 2 and w.ndim == 2, f"want x [R * c, D] and w [D, F], got {x.shape}, {w.shape}")
    check(x.shape[0] % ranks == 0, f"{x.shape[0]} rows are not divisible by {ranks} ranks")
    with jax.named_scope("matmul_reduce_scatter"):
        chunks = x.reshape(ranks, -1, x.shape[1])
        rows, _ = run_schedule(schedule, chunks, prepare=lambda chunk: (chunk[0] @ w)[None])
    return rows[0]


def _places(schedule: Schedule) -> np.ndarray:
    """int32 [R, R]: which of a rank's products is that of each chunk."""
    own = np.arange(schedule.num_ranks)[:, None]
    seen = np.concatenate([own, *arrived_chunks(schedule)], axis=1)
    once = all(sorted(row) == list(range(schedule.num_ranks)) for row in seen.tolist())
    check(once, "the schedule brings a chunk twice, or none")
    return np.argsort(seen, axis=1).astype(np.int32)
