"""Picking an implementation of the gated MLP."""

import jax.numpy as jnp
import pytest

from moejax.core.errors import InputError
from moejax.kernels.grouped_ffn import GatedWeights, explain, grouped_ffn
from tests.kernels.cases import assert_close, normal

SIZES = jnp.asarray([3, 0, 4, 1], jnp.int32)


@pytest.fixture
def operands(key):
    xs, gate, up, down = normal(key, (10, 8), (4, 8, 6), (4, 8, 6), (4, 6, 8))
    return xs, GatedWeights(w_gate=gate, w_up=up, w_down=down)


def test_default_is_blocked_on_cpu(operands):
    choice = explain(*operands, SIZES)
    assert str(choice) == (
        "blocked (tokamax refused: tokamax has kernels for gpu and tpu, not for cpu)"
    )
    forced = grouped_ffn(*operands, SIZES, implementation="reference")
    assert_close(grouped_ffn(*operands, SIZES), forced)


def test_tokamax_refuses_group_rows(operands):
    rows = jnp.arange(4, dtype=jnp.int32)
    choice = explain(*operands, SIZES, group_rows=rows)
    assert choice.refused == (("tokamax", "tokamax.ragged_dot has no group_rows"),)


def test_wrong_input_is_named(operands):
    xs, weights = operands
    short = weights.replace(w_down=weights.w_down[:, :5])
    for args, kwargs, message in [
        ((xs[0], weights, SIZES), {}, r"xs has shape \(8,\), expected \[M, D\]"),
        ((xs[:, :3], weights, SIZES), {}, "w_gate wants D=8"),
        ((xs, short, SIZES), {}, r"w_down has shape \(4, 5, 8\), expected \(4, 6, 8\)"),
        ((xs, weights, SIZES[:2]), {}, r"expected \(4,\) without group_rows"),
        ((xs, weights, SIZES), {"group_rows": SIZES[:2]}, r"group_rows has shape \(2,\)"),
        ((xs, weights, SIZES.astype(float)), {}, "group_sizes is float32, expected int32"),
        ((xs, weights, SIZES), {"activation": "relu"}, "'relu', expected one of"),
        ((xs, weights, SIZES), {"implementation": "fast"}, "'fast', expected one of"),
    ]:
        with pytest.raises(InputError, match=message):
            grouped_ffn(*args, **kwargs)
