"""Bits per byte (or per token) of a model on fixed windows of held-out data, and expert load."""

import math
from functools import partial

import jax
import numpy as np

from moejax.core.errors import check
from moejax.data.text import windows
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams, forward
from moejax.training.loss import cross_entropy


def evaluate(
    params: DecoderParams,
    data: np.ndarray,
    starts: np.ndarray,
    model: DecoderConfig,
    *,
    seq_len: int,
    batch_size: int,
) -> tuple[float, np.ndarray]:
    """Mean bits of the tokens that the windows of `data` at `starts` predict, each scored once.

    The last batch is filled up with copies of the last window and masked, so every window counts
    once and there is one compilation. Returns bits and the expert load int64 [L, E].
    """
    check(len(starts) >= 1, "no windows to evaluate")
    nats, load = 0.0, 0
    for first in range(0, len(starts), batch_size):
        chosen = starts[first : first + batch_size]
        filled = np.concatenate([chosen, np.repeat(chosen[-1:], batch_size - len(chosen))])
        mask = np.arange(batch_size) < len(chosen)
        total, batch_load = _score(params, windows(data, filled, seq_len), mask, model)
        nats, load = nats + float(total), load + np.asarray(batch_load, np.int64)
    return nats / (len(starts) * seq_len) / math.log(2), np.asarray(load)


@partial(jax.jit, static_argnames="model")
def _score(
    params: DecoderParams, tokens: jax.Array, valid: jax.Array, model: DecoderConfig
) -> tuple[jax.Array, jax.Array]:
    """Summed nats and expert load of the rows of tokens int32 [B, S + 1] where `valid` [B]."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    mask = jax.numpy.broadcast_to(valid[:, None], inputs.shape)
    output = forward(params, inputs, model, mask=mask)
    nats = cross_entropy(output.logits, targets)
    return jax.numpy.where(mask, nats, 0.0).sum(), output.metrics.expert_load
