"""Bits per byte over windows: every window counts once, whatever the batch size."""

import math

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.text import sample_windows, windows
from moejax.training.evaluate import evaluate
from moejax.training.loss import cross_entropy
from tests.training.helpers import text_bytes, tiny_model


def test_bits_and_load_of_a_ragged_last_batch(params, run_forward):
    model, data = tiny_model(), text_bytes()
    starts = sample_windows(len(data), 2, 2 * 5)  # 5 windows in batches of 2
    bits, load = evaluate(params, data, starts, model, seq_len=2, batch_size=2)
    nats = []
    for pair in (starts[:2], starts[2:4], starts[3:]):
        tokens = windows(data, pair, 2)
        output = run_forward(params, tokens[:, :-1], model)
        nats.append(np.asarray(cross_entropy(output.logits, tokens[:, 1:])))
    once = np.concatenate([nats[0], nats[1], nats[2][1:]])  # the fourth window is in two pairs
    assert bits == pytest.approx(once.mean() / math.log(2), rel=1e-5)
    assert load.shape == (2, 4) and load.sum() == 2 * 10 * 2  # layers, tokens, top-k
    whole_bits, whole_load = evaluate(params, data, starts[:4], model, seq_len=2, batch_size=2)
    assert whole_bits == pytest.approx(np.concatenate(nats[:2]).mean() / math.log(2), rel=1e-5)
    assert ((load - whole_load) >= 0).all()


def test_refuses_no_windows():
    with pytest.raises(InputError, match="no windows"):
        evaluate(None, text_bytes(), np.array([], int), tiny_model(), seq_len=2, batch_size=2)
