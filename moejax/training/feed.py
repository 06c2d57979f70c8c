"""Batches as global arrays: every process reads the rows that its own devices hold.

Axis letters:
    B  sequences in a global batch    S  positions
"""

from collections.abc import Generator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.data.source import Source
from moejax.training.config import TrainConfig
from moejax.training.sharding import TOKEN_AXES

Batch = jax.Array | np.ndarray


def batch_struct(cfg: TrainConfig, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    """int32 [B, S + 1], where a mesh is given with B over its token axes."""
    sharding = None if mesh is None else NamedSharding(mesh, P(TOKEN_AXES))
    shape = (cfg.batch_size, cfg.seq_len + 1)
    return jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)


def feed(
    source: Source, cfg: TrainConfig, mesh: Mesh | None, step: int
) -> Generator[Batch, None, None]:
    """The batches of `step` and of all steps after it, as `batch_struct` says."""
    struct = batch_struct(cfg, mesh)
    for rows in source.batches(step, local_rows(struct)):
        yield place(rows, struct)


def local_rows(struct: jax.ShapeDtypeStruct) -> np.ndarray:
    """Sorted rows of a batch that the devices of this process hold; all of them without a mesh."""
    every = np.arange(struct.shape[0])
    if struct.sharding is None:
        return every
    index = struct.sharding.addressable_devices_indices_map(struct.shape)
    return np.unique(np.concatenate([every[where[0]] for where in index.values() if where]))


def place(rows: np.ndarray, struct: jax.ShapeDtypeStruct) -> Batch:
    """The global array of which `rows` are this process's part; `rows` itself without a mesh."""
    if struct.sharding is None:
        return rows
    return jax.make_array_from_process_local_data(struct.sharding, rows, struct.shape)
