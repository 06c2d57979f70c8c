"""Coded sums are those of what the workers say that they sent: nothing is lost on the way."""

import jax
import numpy as np

from moejax.collectives.codecs import Bfloat16, BlockQuant, TopK, TwoBit
from moejax.sync.reduce import coded_sum, of_sum, sent_bytes
from tests.collectives.cases import over

CODECS = [None, TopK(9, 64), TwoBit(0.5), Bfloat16(), BlockQuant(8, 16), BlockQuant(4, 16)]


def test_workers_agree_on_the_sum_of_what_was_sent():
    x = np.random.default_rng(0).standard_normal((4, 103)).astype(np.float32)
    reducers = [coded_sum(("data",), codec) for codec in CODECS]

    def body(x):
        return [[part[None] for part in reducer(x[0])] for reducer in reducers]

    run, sharding = over(body, {"data": 4})
    results = run(jax.device_put(x, sharding))
    for codec, (total, sent) in zip(CODECS, results, strict=True):
        total, sent = np.asarray(total), np.asarray(sent)
        assert (total == total[0]).all(), codec
        assert (sent == x).all() == (codec is None), codec
        np.testing.assert_allclose(total[0], sent.sum(0), rtol=1e-6, atol=2e-6, err_msg=str(codec))
        if codec is not None:
            off = np.abs(total[0] - x.sum(0)).max()
            assert 1e-6 < off < 8, codec


def test_two_bits_of_a_sum_are_those_of_the_mean():
    assert of_sum(TwoBit(0.5), 4) == TwoBit(2.0) and of_sum(TopK(2, 8), 4) == TopK(2, 8)
    assert sent_bytes(100, 4, TwoBit(0.5)) == 2 * 3 * 7  # chunks of 25 weights
