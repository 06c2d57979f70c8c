"""Codecs are projections to the bit, as long as they say, and as exact as they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.collectives.codecs import Bfloat16, BlockQuant, TopK, TwoBit
from moejax.core.errors import InputError

N = 301
CODECS = {
    "bf16": Bfloat16(),
    "int8": BlockQuant(),
    "int8 short": BlockQuant(8, 2),
    "int4": BlockQuant(4, 32),
    "two bits": TwoBit(0.1),
    "top-k": TopK(7, 64),
    "top-k, long blocks": TopK(9, 300),
}


def _rows(dtype=jnp.float32):
    """Magnitudes from 1e-38 to 1e38, whole rows of them and mixed; zeros."""
    rng = np.random.default_rng(0)
    scales = np.concatenate([10.0 ** rng.uniform(-38, 37.5, (60, 1)) * np.ones((60, N)),
                             10.0 ** rng.uniform(-6, 6, (59, N)), np.zeros((1, N))])  # fmt: skip
    return jnp.asarray(np.clip(rng.standard_normal(scales.shape), -3, 3) * scales, dtype)


def _coded(codec, dtype=jnp.float32):
    @jax.jit
    def run(x):
        wire = codec.encode(x)
        y = codec.decode(wire, N, dtype)
        again = codec.encode(y)
        return wire, y, again, codec.decode(again, N, dtype)

    return run


@pytest.mark.parametrize("name", CODECS)
def test_coding_twice_changes_nothing_more(name):
    codec = CODECS[name]
    wire, y, again, twice = _coded(codec)(_rows())
    np.testing.assert_array_equal(y, twice)
    if "top-k" not in name:  # which zeros it names is open
        np.testing.assert_array_equal(wire, again)
    assert wire.nbytes == len(wire) * codec.nbytes(N, 4)
    assert jnp.issubdtype(wire.dtype, jnp.unsignedinteger)


@pytest.mark.parametrize("name, bound", [("int8", 0.502 / 127), ("int4", 0.51 / 7)])
def test_blocks_are_as_exact_as_they_say(name, bound):
    codec, x = CODECS[name], _rows()
    y = _coded(codec)(x)[1]
    pad = -N % codec.block
    blocks = [
        np.pad(np.asarray(v, np.float64), ((0, 0), (0, pad))).reshape(len(x), -1, codec.block)
        for v in (x, y - x)
    ]
    largest, error = (np.abs(v).max(-1) for v in blocks)
    usual = largest > 1e-35  # below, the scale is no normal bfloat16 and the block is zero
    assert usual.sum() > 100 and (error[usual] <= bound * largest[usual]).all()
    assert (error <= largest).all()


def test_other_codecs_by_hand():
    x = jnp.array([[0.3, -0.05, -0.1, 0.1, 0.0, -7.0, 0.099]])

    def bf16(value):
        return float(jnp.bfloat16(value))

    two = TwoBit(0.1)
    np.testing.assert_array_equal(
        two.decode(two.encode(x), 7, x.dtype), np.float32([[0.1, 0, -0.1, 0.1, 0, -0.1, 0]])
    )
    top = TopK(1, 4)
    np.testing.assert_array_equal(
        top.decode(top.encode(x), 7, x.dtype), np.float32([[bf16(0.3), 0, 0, 0, 0, -7, 0]])
    )
    short = Bfloat16()
    np.testing.assert_array_equal(
        short.decode(short.encode(x), 7, x.dtype), x.astype(jnp.bfloat16).astype(x.dtype)
    )
    assert [c.nbytes(7, 4) for c in (two, top, short, BlockQuant(4, 4))] == [2, 6, 14, 8]


@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "two bits", "top-k"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_not_hidden(name, bad):
    x = np.zeros((2, N), np.float32)
    x[0, 5] = bad
    y = _coded(CODECS[name])(jnp.asarray(x))[1]
    assert not np.isfinite(y[0]).all() and (np.asarray(y[1]) == 0).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: BlockQuant(5), "bits=5 is not 4 or 8"),
        (lambda: BlockQuant(4, 7), "block=7 must be even"),
        (lambda: TwoBit(0.0), "threshold=0.0 must be positive"),
        (lambda: TopK(0), "k=0 must be between 1 and block=1024"),
        (lambda: TopK(9, 8), "k=9 must be between 1 and block=8"),
        (lambda: TopK(9, 2**17), "block=131072 must be between 2 and 65536"),
        (
            lambda: BlockQuant().encode(jnp.ones((1, 8), jnp.bfloat16)),
            "float32, got bfloat16",
        ),
    ],
)
def test_what_cannot_be_coded_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
