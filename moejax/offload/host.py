"""Missing experts computed where their weights are: by the host's processor, out of host memory.

Rows travel instead of weights: at decode a row is thousands of times smaller than an expert. The
host runs the very kernel of the device with the host store in place of the slot cache, in one call
per layer that is started before the transfers of the experts that do move.

Axis letters:
    M  rows, T * K    D  model dim    E  experts of this rank    N  granules    S  padding rows
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.core.host_compute import on_host
from moejax.kernels.grouped_ffn import run_chunks
from moejax.kernels.vma import vary_together
from moejax.offload.source import HostSource
from moejax.offload.waves import Call


def run_on_host(call: Call) -> jax.Array:
    """Outputs [M + S, D] in processing order of the experts that are not moved; rubbish elsewhere.

    Cost: `num_missing - num_moved` experts read from host memory; 2 * M * D values cross the link.
    """
    work, source = call.work, call.source
    assert isinstance(source, HostSource), "the host computes out of its own memory"
    first, end = work.num_cached + work.num_moved, work.num_cached + work.num_missing
    granules = work.layer * work.wanted.shape[0] + work.order

    plan = call.plan
    begin, stop = plan.first_chunk[first], plan.first_chunk[end]
    operands = (source.rows, call.xs, granules, plan, begin, stop)
    with jax.named_scope("offload_host"):
        # What runs on a host is lowered for CPU, but the compilers of TPUs fail on gathers there.
        return jax.lax.platform_dependent(
            *operands, cpu=_on_host(call.sizes, False), default=_on_host(call.sizes, True)
        )


def _on_host(sizes: tuple[int, ...], portable: bool) -> Callable[..., jax.Array]:
    def run(store, xs, granules, plan, begin, end):
        y, _ = vary_together(jnp.zeros_like(xs), (xs, store))
        return run_chunks(y, xs, store, granules, plan, begin, end, sizes=sizes, portable=portable)

    return on_host(run)


def pick_rows(call: Call, y: jax.Array, y_host: jax.Array) -> jax.Array:
    """`y` [M + S, D] with the rows of the experts that the host computed taken from `y_host`."""
    work = call.work
    position = jnp.arange(work.order.shape[0], dtype=jnp.int32)
    sizes = call.permutation.group_sizes
    first, end = work.num_cached + work.num_moved, work.num_cached + work.num_missing
    begin = jnp.sum(jnp.where(position < first, sizes, 0))
    stop = jnp.sum(jnp.where(position < end, sizes, 0))
    row = jnp.arange(y.shape[0], dtype=jnp.int32)
    return jnp.where(((row >= begin) & (row < stop))[:, None], y_host, y)
