"""Rows of a range of chunks: those and no others are written, blocks and single rows alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.chunks import plan_chunks
from moejax.kernels.grouped_ffn.by_row import run_rows
from moejax.kernels.grouped_ffn.weights import GatedWeights
from tests.kernels.cases import assert_close, normal

GROUPS, D, F = 6, 16, 24
SIZES = np.asarray([3, 0, 5, 1, 0, 4], np.int32)  # 13 rows: a block of eight, five alone
SLOTS = np.asarray([7, 0, 2, 5, 1, 3], np.int32)


@jax.jit
def run(xs, weights, begin, end):
    plan = plan_chunks(jnp.asarray(SIZES), sizes=(1, 2), num_rows=len(xs))
    first = plan.first_chunk
    out = (jnp.full_like(xs, jnp.nan),)
    return run_rows(out, xs, weights, jnp.asarray(SLOTS), plan, first[begin], first[end])[0]


@pytest.mark.parametrize("begin, end", [(0, GROUPS), (2, 4), (3, 3), (0, 3)])
def test_only_the_rows_of_the_groups_are_written(key, begin, end):
    xs, gate, up, down = normal(key, (13, D), (8, D, F), (8, D, F), (8, F, D))
    got = np.asarray(run(xs, GatedWeights(w_gate=gate, w_up=up, w_down=down), begin, end))
    slot = SLOTS[np.repeat(np.arange(GROUPS), SIZES)]
    rows = np.cumsum([0, *SIZES])[[begin, end]]
    mine = (np.arange(13) >= rows[0]) & (np.arange(13) < rows[1])
    hidden = jax.nn.silu(jnp.einsum("nd,ndf->nf", xs, gate[slot]))
    want = jnp.einsum("nf,nfd->nd", hidden * jnp.einsum("nd,ndf->nf", xs, up[slot]), down[slot])
    assert np.isnan(got[~mine]).all() and not np.isnan(got[mine]).any()
    if mine.any():
        assert_close(got[mine], np.asarray(want)[mine])
