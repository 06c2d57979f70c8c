"""Chunks in pairs are what they are alone, to the bit, whatever their partner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.chunks import plan_chunks, zero_tail
from moejax.kernels.grouped_ffn import GatedWeights, run_chunks
from tests.exact import exact_jit
from tests.kernels.cases import assert_close, normal

SIZES, D, F = (4, 16), 16, 24
# Ten chunks: 16 16, 16 4, none, 16, 16 16 16, 4, 4; three pairs of 16, and one without a partner.
GROUPS = np.asarray([32, 19, 0, 7, 48, 3, 2], np.int32)
SLOTS = np.asarray([7, 0, 2, 5, 1, 3, 0], np.int32)
M = int(GROUPS.sum())


@exact_jit
def run(xs, weights, bounds):
    """Chunks between each two neighbours of `bounds` in a call of their own."""
    plan = plan_chunks(jnp.asarray(GROUPS), sizes=SIZES, num_rows=M)
    padded = jnp.pad(xs, ((0, SIZES[-1]), (0, 0)))

    def once(i, y):
        ends = bounds[i], bounds[i + 1]
        return run_chunks(y, padded, weights, jnp.asarray(SLOTS), plan, *ends, sizes=SIZES)

    y = jax.lax.fori_loop(0, bounds.shape[0] - 1, once, jnp.zeros_like(padded))
    return zero_tail(y, jnp.int32(M), sizes=SIZES)[:M]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pairs_are_what_their_chunks_are_alone(key, dtype):
    xs, gate, up, down = normal(key, (M, D), (8, D, F), (8, D, F), (8, F, D), dtype=dtype)
    b_gate, b_up, b_down = normal(key, (8, F), (8, F), (8, D), dtype=dtype)
    weights = GatedWeights(
        w_gate=gate, w_up=up, w_down=down, b_gate=b_gate, b_up=b_up, b_down=b_down
    )
    pad = lambda bounds: jnp.asarray(np.pad(bounds, (0, 11 - len(bounds)), "edge"))  # noqa: E731
    together = run(xs, weights, pad([0, 10]))
    for bounds in (np.arange(11), [0, 2, 10], [0, 1, 4, 5, 10]):
        np.testing.assert_array_equal(together, run(xs, weights, pad(bounds)))
    slot = SLOTS[np.repeat(np.arange(len(GROUPS)), GROUPS)]
    x, w = xs.astype(jnp.float32), jax.tree.map(lambda a: np.asarray(a, np.float32), weights)
    product = lambda x, w, b: jnp.einsum("nd,ndf->nf", x, w[slot]) + b[slot]  # noqa: E731
    hidden = jax.nn.silu(product(x, w.w_gate, w.b_gate)) * product(x, w.w_up, w.b_up)
    want = product(hidden, w.w_down, w.b_down)
    assert_close(together, want.astype(dtype), 1e-5 if dtype == jnp.float32 else 1e-2)


def test_a_pair_is_one_batch_of_two(key):
    xs, gate, up, down = normal(key, (M, D), (8, D, F), (8, D, F), (8, F, D))
    weights = GatedWeights(w_gate=gate, w_up=up, w_down=down)
    text = run.lower(xs, weights, jnp.arange(3)).as_text()
    assert f"tensor<2x16x{D}xf32>, tensor<2x{D}x{F}xf32>" in text
