"""Picking an implementation, and what each refuses."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.kernels import pick
from moejax.kernels.grouped_matmul import api, explain, grouped_matmul
from moejax.kernels.grouped_matmul.shapes import SHAPES, draw_group_sizes, tiny
from tests.kernels.cases import assert_close, normal

SIZES = jnp.asarray([3, 0, 4, 1], jnp.int32)


@pytest.fixture
def operands(key):
    return normal(key, (10, 8), (4, 8, 6))


@pytest.mark.parametrize("name", ["blocked", "ragged_dot", "reference"])
def test_each_can_be_forced_and_agrees(operands, name):
    assert explain(*operands, SIZES, implementation=name) == pick.Choice(implementation=name)
    got = grouped_matmul(*operands, SIZES, implementation=name)
    want = np.zeros((10, 6), np.float32)
    for row, group in enumerate(np.repeat(np.arange(4), SIZES)):
        want[row] = np.asarray(operands[0][row]) @ np.asarray(operands[1][group])
    assert_close(got, want)
    assert not np.any(got[8:])


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_at_a_small_size(key, name):
    shape = tiny(SHAPES[name])
    sizes = draw_group_sizes(shape, zipf=1.2, seed=0)
    assert sizes.sum() == shape.num_rows and sizes.max() <= shape.num_tokens
    lhs, rhs = normal(
        key, (shape.num_rows, shape.d_model), (shape.num_experts, shape.d_model, shape.d_ff)
    )
    got, want = (jax.jit(api.BACKENDS[b])(lhs, rhs, sizes) for b in ("blocked", "reference"))
    assert_close(got, want)


def test_default_says_what_it_picked_and_why(operands, caplog):
    pick._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="moejax.kernels"):
        grouped_matmul(*operands, SIZES)
        grouped_matmul(*operands, SIZES)
    assert [record.getMessage() for record in caplog.records] == [
        "grouped_matmul runs on blocked "
        "(tokamax refused: tokamax has kernels for gpu and tpu, not for cpu)"
    ]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*operands, SIZES)]
    choice = explain(*shapes)
    assert choice.implementation == "blocked"
    assert [name for name, _ in choice.refused] == ["tokamax"]


def test_a_refusal_moves_on_and_all_refusals_are_listed(operands):
    offset = {"group_offset": jnp.int32(0)}
    order = ("ragged_dot", "reference")
    choice = explain(*operands, SIZES, implementation=order, **offset)
    assert choice.implementation == "reference"
    assert choice.refused == (("ragged_dot", "ragged_dot has no group_offset on any backend"),)
    with pytest.raises(NotImplementedError, match="ragged_dot: .*group_offset.*; tokamax: .*cpu"):
        grouped_matmul(*operands, SIZES, implementation=("ragged_dot", "tokamax"), **offset)
    half = [a.astype(jnp.float16) for a in operands]
    with pytest.raises(NotImplementedError, match="lhs is float16, not float32 or bfloat16"):
        grouped_matmul(*half, SIZES, implementation="blocked")
    assert explain(*half, SIZES).implementation == "ragged_dot"


def test_wrong_input_is_named(operands):
    lhs, rhs = operands
    for args, kwargs, message in [
        ((lhs[0], rhs, SIZES), {}, r"lhs has shape \(8,\), expected \[M, K\]"),
        ((lhs, rhs[0], SIZES), {}, r"rhs has shape \(8, 6\), expected \[G, K, N\]"),
        ((lhs[:, :5], rhs, SIZES), {}, r"lhs has shape \(10, 5\), rhs has \(4, 8, 6\)"),
        ((lhs, rhs, SIZES[:3]), {}, "3 group_sizes for 4 groups, and no group_offset"),
        ((lhs, rhs, SIZES[:3]), {"group_offset": jnp.int32(0)}, "3 group_sizes for 4 groups"),
        ((lhs, rhs, SIZES.astype(float)), {}, "group_sizes is float32, expected int32"),
        ((lhs, rhs, SIZES), {"group_offset": jnp.ones(1)}, "group_offset is float32"),
        ((lhs, rhs, SIZES), {"implementation": "cuda"}, "'cuda', expected one of"),
    ]:
        with pytest.raises(InputError, match=message):
            grouped_matmul(*args, **kwargs)
