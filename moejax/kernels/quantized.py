"""Quantised matrices: what is stored of them, and how they become float32 again.

A matrix [A, B] is cut along A, the dim that products contract, in groups of G rows; a group has one
float32 scale per column. What stands there is a number of few bits times its scale:

    int8    whole numbers up to 127    int4    up to 7    fp8    float8_e4m3fn

Weights alone are quantised: products are those of the float32 matrix that `dequantize` gives.

Values travel as 32-bit words, P of one column to a word. XLA:TPU copies a whole host stack of 8-bit
numbers to slice it, as its tiles for them differ between memories; words it slices in place. It
transposes a stack whose rows do not fill tiles of 8, and then fails to slice it; hence scales are
one row. Value p of word i of a group stands for row `p * G / P + i` of the group: to unpack is to
shift whole tiles P times, and nothing is transposed.

Axis letters:
    R  matrices of a stack    A, B  dims of a matrix    G  rows of a group    P  values of a word
"""

from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

Format = Literal["int8", "int4", "fp8"]
_BITS: dict[str, int] = {"int8": 8, "int4": 4, "fp8": 8}
FORMATS = tuple(_BITS)
Tree = TypeVar("Tree")


@struct.dataclass(kw_only=True)
class Quantized:
    """Stands for a stack of float32 matrices [..., A, B], whose `shape` and `dtype` it has.

    Both leaves keep the leading axes of the stack, so what slices, moves or shards a stack by them
    does the same to this. Made by `moejax.experts.quantize`. Forward only.
    """

    q: jax.Array  # int32 [..., A / P, B], words
    scale: jax.Array  # float32 [..., 1, A / G * B], group after group
    format: str = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, words, columns = self.q.shape
        return (*leading, words * values_per_word(self.format), columns)

    @property
    def ndim(self) -> int:
        return self.q.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)


Matrix: TypeAlias = jax.Array | Quantized


def is_quantized(tree: Any) -> bool:
    """Whether any part of `tree` is `Quantized`."""
    return any(whole_matrix(node) for node in jax.tree.leaves(tree, is_leaf=whole_matrix))


def whole_matrix(node: Any) -> bool:
    """An `is_leaf` for which quantised matrices are leaves, as arrays are."""
    return isinstance(node, Quantized)


def values_per_word(format: str) -> int:
    """P: how many values of a column a 32-bit word holds."""
    return 32 // _BITS[format]


def decode(words: jax.Array, p: int, format: str) -> jax.Array:
    """Value p of every word of an int32 array, as float32, not scaled yet."""
    bits = _BITS[format]
    if format == "fp8":
        return _widen_e4m3(lax.shift_right_logical(words, bits * p))
    # The value's sign bit moves to the word's, and back with copies of it.
    high = lax.shift_left(words, 32 - bits * (p + 1))
    return lax.shift_right_arithmetic(high, 32 - bits).astype(jnp.float32)


def _widen_e4m3(words: jax.Array) -> jax.Array:
    """float32 of the float8_e4m3fn in the lowest byte of int32 words, exact but for NaN.

    In whole numbers, because the conversion of XLA:CPU makes a product four times slower.
    """

    def float_of(bits: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(bits, jnp.float32)

    magnitude = lax.shift_left(words & 0x7F, 20)  # exponent and mantissa where float32 has them
    normal = float_of(magnitude + (120 << 23))  # 120 is the difference of the biases
    subnormal = float_of(magnitude + (121 << 23)) - 2.0**-6
    value = jnp.where(magnitude < 1 << 23, subnormal, normal)
    sign = lax.shift_left(words & 0x80, 24)
    return float_of(lax.bitcast_convert_type(value, jnp.int32) | sign)


def dequantize(matrix: Quantized) -> jax.Array:
    """The float32 matrices [..., A, B] that `matrix` stands for. Cost: one pass over them."""
    *leading, _, columns = matrix.q.shape
    groups = matrix.scale.shape[-1] // columns
    words = matrix.q.reshape(*leading, groups, -1, columns)  # [..., A / G, G / P, B]
    parts = range(values_per_word(matrix.format))
    values = jnp.stack([decode(words, p, matrix.format) for p in parts], axis=-3)
    scaled = values * matrix.scale.reshape(*leading, groups, 1, 1, columns)
    return scaled.reshape(*leading, -1, columns)


def dequantize_tree(tree: Tree, dtype: jnp.dtype) -> Tree:
    """`tree` with an array of `dtype` for every `Quantized` in it; arrays stay as they are."""

    def plain(leaf: Any) -> Any:
        return dequantize(leaf).astype(dtype) if isinstance(leaf, Quantized) else leaf

    return jax.tree.map(plain, tree, is_leaf=whole_matrix)
