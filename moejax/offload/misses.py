"""Who serves a miss: the link, which moves the expert, or the host, which computes it.

The division is made inside the compiled step, from the rows that each missing expert really has:
those with most rows move, since the host's time grows with rows and the link's does not, and link
and host shall end together (`costmodel.presched.serve_whole`, the same sweep in numpy).

Axis letters:
    E  experts of this rank
"""

from typing import Literal

import jax
import jax.numpy as jnp

from moejax.costmodel.miss import MissCosts

# All misses moved; all computed by the host; divided by cost.
Serve = Literal["fetch", "host", "divide"]


def num_moved(
    rows: jax.Array, num_missing: jax.Array, serve: Serve, costs: MissCosts | None
) -> jax.Array:
    """int32 []: how many of the missing experts the link moves, the first ones.

    Args:
        rows: int32 [E], rows of the missing experts, descending; what follows them is not read.
        costs: of one expert, for `divide`.
    """
    if serve == "fetch":
        return num_missing
    if serve == "host":
        return jnp.zeros_like(num_missing)
    assert costs is not None
    index = jnp.arange(rows.shape[0] + 1, dtype=jnp.int32)
    host_s = jnp.maximum(costs.host_read_s, costs.host_row_s * rows.astype(jnp.float32))
    host_s = jnp.where(index[:-1] < num_missing, host_s, 0.0)
    rest = jnp.concatenate([jnp.cumsum(host_s[::-1])[::-1], jnp.zeros_like(host_s[:1])])
    ends = jnp.maximum(index.astype(jnp.float32) * costs.fetch_s, rest)
    return jnp.argmin(jnp.where(index <= num_missing, ends, jnp.inf)).astype(jnp.int32)
