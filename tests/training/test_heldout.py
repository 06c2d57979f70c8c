"""Held-out text scored on a mesh is scored as by the evaluation on one device."""

import math

import jax
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.training.evaluate import evaluate
from moejax.training.heldout import heldout_starts, score_heldout
from moejax.training.sharding import state_shardings
from tests.training.helpers import text_bytes, tiny_model, tiny_train

MODEL, CFG = tiny_model(), tiny_train(batch_size=4)


def test_bits_and_load_are_those_of_one_device(params):
    data, mesh = text_bytes()[:400], make_mesh(data=2, expert=2)
    starts = heldout_starts(data, CFG, 2)
    assert len(set(starts.tolist())) == 8
    bits, load = evaluate(params, data, starts, MODEL, seq_len=CFG.seq_len, batch_size=8)
    sharded = jax.device_put(params, state_shardings(params, mesh, CFG))
    nats, got = score_heldout(sharded, data, MODEL, CFG, mesh, num_batches=2)
    np.testing.assert_allclose(nats / math.log(2), bits, rtol=1e-6)
    np.testing.assert_array_equal(got, load)
    assert got.sum() == 2 * 8 * CFG.seq_len * 2  # layers, sequences, tokens, experts of a token


def test_refuses_a_text_that_is_too_short():
    with pytest.raises(InputError, match="20 held-out bytes are 4 windows of seq_len=4, .* want 8"):
        heldout_starts(text_bytes()[:20], CFG, 2)
