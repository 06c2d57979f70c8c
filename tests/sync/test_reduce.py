"""Coded sums are those of what the workers say that they sent, to the last sum's code."""

import jax
import numpy as np

from moejax.collectives.codecs import Bfloat16, BlockQuant, TopK, TwoBit
from moejax.sync.reduce import coded_sum
from tests.collectives.cases import over

CODECS = {
    None: 1e-6,
    TopK(9, 64): 1e-6,
    TwoBit(0.5): 1e-6,
    Bfloat16(): 2.0**-8,
    BlockQuant(8, 16): 1 / 127,
    BlockQuant(4, 16): 1 / 7,
}


def test_workers_agree_on_the_sum_of_what_was_sent():
    x = np.random.default_rng(0).standard_normal((4, 103)).astype(np.float32)
    reducers = [coded_sum(("data",), codec) for codec in CODECS]

    def body(x):
        return [[part[None] for part in reducer(x[0])] for reducer in reducers]

    run, sharding = over(body, {"data": 4})
    results = run(jax.device_put(x, sharding))
    for (codec, bound), (total, sent) in zip(CODECS.items(), results, strict=True):
        total, sent = np.asarray(total), np.asarray(sent)
        assert (total == total[0]).all(), codec
        assert (sent == x).all() == (codec is None), codec
        error = np.abs(total[0] - sent.sum(0)).max()
        assert error <= bound * np.abs(sent.sum(0)).max(), codec
