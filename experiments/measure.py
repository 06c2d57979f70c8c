"""Bandwidths of this machine, measured in the run that reports a fraction of them."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core.memory import fetch_rows
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.offload.disk import DiskExperts
from moejax.offload.precision import TwoPrecisions
from moejax.offload.source import Store
from moejax.offload.store import expert_bytes, flatten

_MOST_BYTES = 2**28  # of the device, to measure with


def best_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The shortest of so many timed calls of `run`, after one that compiles."""
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - begin)
    return best


def stream_read_bytes_per_s(mib: int = 256, repeats: int = 7) -> float:
    """Best device read rate: a matrix-vector product over `mib` MiB of float32."""
    columns = 1024
    matrix = jnp.ones((mib * 2**20 // (4 * columns), columns), jnp.float32)
    vector = jnp.ones((columns,), jnp.float32)
    product = jax.jit(lambda m, v: m @ v)
    return matrix.nbytes / best_seconds(lambda: product(matrix, vector), repeats)


def host_fetch_bytes_per_s(store: GatedWeights, experts: int = 64, repeats: int = 7) -> float:
    """Best host-to-device rate: compiled fetches of random experts into device rows.

    The same slices that the offloaded step issues, `experts` of them in one program, into a
    donated buffer. Every call fetches others, as a step does: a processor keeps what it has just
    copied in its cache, and copies it twice as fast again. `store` has leaves [L, E, ...] in
    `pinned_host`. Fewer than `experts` where they would take more than 256 MiB of the device, but
    one.
    """
    order = np.random.default_rng(0).permutation(store.w_gate.shape[0] * store.w_gate.shape[1])
    experts = max(1, min(experts, len(order), _MOST_BYTES // expert_bytes(store)))
    rows = jax.tree.map(lambda leaf: jnp.zeros((experts, *leaf.shape[2:]), leaf.dtype), store)

    def fill(store, rows, ids):
        flat = flatten(store)

        def bring(i, rows):
            fetched = fetch_rows(flat, ids[i])
            return jax.tree.map(
                lambda a, row: jax.lax.dynamic_update_index_in_dim(a, row, i, 0), rows, fetched
            )

        return jax.lax.fori_loop(0, experts, bring, rows)

    program = jax.jit(fill, donate_argnums=1)
    turns = [jnp.asarray(np.roll(order, -i * experts)[:experts]) for i in range(repeats + 1)]
    state, calls = [rows], itertools.cycle(jax.block_until_ready(turns))

    def run():
        state[0] = program(store, state[0], next(calls))
        return state[0]

    return experts * expert_bytes(store) / best_seconds(run, repeats)


def page_cache_bytes_per_s(disk: DiskExperts, experts: int = 16, repeats: int = 7) -> float:
    """Best rate at which rows are copied out of files that the page cache holds."""
    total = disk.shapes.w_gate.shape[0] * disk.shapes.w_gate.shape[1]
    ids = np.random.default_rng(0).integers(0, total, experts)
    rows = jax.tree.map(np.array, disk.row(0))

    def run():
        for granule in ids:
            jax.tree.map(np.copyto, rows, disk.row(granule))

    return experts * expert_bytes(disk.shapes) / best_seconds(run, repeats)


def fetch_bytes_per_s(store: Store) -> float:
    """Best rate at which a missing expert comes: from host memory, or from the page cache."""
    if isinstance(store, DiskExperts):
        return page_cache_bytes_per_s(store)
    return host_fetch_bytes_per_s(store.full if isinstance(store, TwoPrecisions) else store)
