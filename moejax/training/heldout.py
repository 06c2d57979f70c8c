"""Held-out text scored on the mesh of a run, and where its tokens went.

Axis letters:
    N  bytes of held-out text    B  sequences in a batch    S  positions
    L  MoE layers    E  experts
"""

import dataclasses
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.core.errors import check
from moejax.data.text import sample_windows, windows
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.training.config import TrainConfig
from moejax.training.feed import batch_struct, local_rows, place
from moejax.training.loss import LossMetrics
from moejax.training.sharding import sharded_loss, state_shardings


def score_heldout(
    params: DecoderParams,
    data: np.ndarray,
    model: DecoderConfig,
    cfg: TrainConfig,
    mesh: Mesh,
    *,
    num_batches: int,
) -> tuple[float, np.ndarray]:
    """Mean nats per token and expert load int64 [L, E] on fixed windows of `data` uint8 [N].

    All processes call it and get the same. Raises `InputError` when the text is too short for so
    many batches. Cost: `num_batches` forward passes; compiled once per run.
    """
    struct = batch_struct(cfg, mesh)
    starts = heldout_starts(data, cfg, num_batches)
    rows, results = local_rows(struct), []
    for chosen in starts.reshape(num_batches, cfg.batch_size):
        tokens = place(windows(data, chosen[rows], cfg.seq_len), struct)
        results.append(_score(params, tokens, model=model, cfg=cfg, mesh=mesh))
    nats = np.mean([float(one.cross_entropy) for one in results])
    load = np.sum([np.asarray(one.expert_load, np.int64) for one in results], axis=0)
    return float(nats), load


def heldout_starts(data: np.ndarray, cfg: TrainConfig, num_batches: int) -> np.ndarray:
    """int64 [num_batches * B] starts of the windows; raises `InputError` when there are fewer."""
    want = num_batches * cfg.batch_size
    starts = sample_windows(len(data), cfg.seq_len, want * cfg.seq_len)
    check(
        len(starts) == want,
        f"corpus too small: {len(data)} held-out bytes are {len(starts)} windows of "
        f"seq_len={cfg.seq_len}, eval_batches={num_batches} of batch_size={cfg.batch_size} want "
        f"{want}",
    )
    return starts


@partial(jax.jit, static_argnames=("model", "cfg", "mesh"))
def _score(
    params: DecoderParams, tokens: jax.Array, model: DecoderConfig, cfg: TrainConfig, mesh: Mesh
) -> LossMetrics:
    on_device = dataclasses.replace(cfg, experts_memory="device")
    params = jax.device_put(params, state_shardings(params, mesh, on_device))
    return sharded_loss(params, tokens, model, cfg, mesh)[1]
