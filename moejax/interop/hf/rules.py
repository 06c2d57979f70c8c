"""A language for name maps: which tensor of a checkpoint is which parameter, and in what layout.

    Rule("model.layers.{l}.self_attn.q_proj.weight", "attention.w_q", LINEAR)

One table of such rules serves both directions. In a name, `{l}` is the layer, `{e}` an expert;
`{half}` and `{side}` are `l // 2` and `l % 2`. A parameter is a path in one layer's `LayerParams`,
in `DecoderParams` where the name has no layer, or `experts.*` in the stack of all experts. A rule
whose parameters a layer does not have does not apply to it: one table holds dense and MoE layers.

A `Layout` turns the tensor into the parameters' arrays and back, without loss.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a tensor holds parameters.

    Attributes:
        load: (tensor, shapes of the parameters) -> their arrays.
        save: arrays -> tensor.
    """

    load: Callable[[np.ndarray, list[Shape]], list[np.ndarray]]
    save: Callable[[list[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors called `name` hold the parameters `to` (one, or several separated by spaces).

    Attributes:
        stacked: the tensor holds all experts of a layer along its first axis; the layout is that
            of one of them.
    """

    name: str
    to: str
    how: Layout
    stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Either:
    """Sets of rules for the same parameters; a checkpoint follows one, the first is written."""

    options: tuple[tuple[Rule, ...], ...]


Rules: TypeAlias = tuple[Rule | Either, ...]


def _one(load: Callable[[np.ndarray, Shape], np.ndarray], save: Callable) -> Layout:
    """The layout of a tensor that holds one parameter."""
    return Layout(
        load=lambda tensor, shapes: [load(tensor, shapes[0])], save=lambda arrays: save(arrays[0])
    )


AS_IS = _one(lambda tensor, shape: tensor.reshape(shape), lambda array: array)
# A vector, whatever axes the parameter sees in it.
FLAT = _one(lambda tensor, shape: tensor.reshape(shape), lambda array: array.reshape(-1))
# The same of a row, [1, N].
FLAT_ROW = _one(lambda tensor, shape: tensor.reshape(shape), lambda array: array.reshape(1, -1))


def linear(inputs: int = 1) -> Layout:
    """PyTorch's [out, in]; ours has its `inputs` input axes first."""

    def load(tensor, shape):
        return tensor.T.reshape(shape)

    def save(array):
        return array.reshape(int(np.prod(array.shape[:inputs])), -1).T

    return _one(load, save)


LINEAR = linear()


def paired(dims: int, inputs: int = 1) -> Layout:
    """`linear` whose last `dims` outputs of a head are rotated as neighbouring pairs.

    Ours are rotated as halves: pair i is dims i and i + dims / 2. Scores do not depend on the order
    as long as queries and keys share it.
    """
    inner = linear(inputs)
    order = np.concatenate([np.arange(0, dims, 2), np.arange(1, dims, 2)])

    def reorder(array, index):
        tail = array[..., array.shape[-1] - dims :][..., index]
        return np.concatenate([array[..., : array.shape[-1] - dims], tail], -1)

    return Layout(
        load=lambda tensor, shapes: [reorder(inner.load(tensor, shapes)[0], order)],
        save=lambda arrays: inner.save([reorder(arrays[0], np.argsort(order))]),
    )


def _gate_up(split: Callable, join: Callable, transposed: bool) -> Layout:
    """Gate and up of one expert in one tensor; [outputs, in] where `transposed`."""

    def load(tensor, shapes):
        tensor = tensor.T if transposed else tensor
        return [part.reshape(shape) for part, shape in zip(split(tensor), shapes, strict=True)]

    def save(arrays):
        both = join(arrays)
        return both.T if transposed else both

    return Layout(load=load, save=save)


def _halves(tensor):
    return np.split(tensor, 2, axis=-1)


def _even_odd(tensor):
    return tensor[..., ::2], tensor[..., 1::2]


def _concatenate(arrays):
    return np.concatenate(arrays, -1)


def _interleave(arrays):
    return np.stack(arrays, -1).reshape(*arrays[0].shape[:-1], -1)


GATE_UP = _gate_up(_halves, _concatenate, transposed=True)  # [2F, D]
GATE_UP_AS_IS = _gate_up(_halves, _concatenate, transposed=False)  # [D, 2F]
GATE_UP_INTERLEAVED = _gate_up(_even_odd, _interleave, transposed=False)  # [D, 2F] or [2F]


def heads_of_two(first: int, second: int) -> Layout:
    """Two linear maps to heads in one tensor [H * (first + second), in]."""

    def load(tensor, shapes):
        heads = shapes[0][1]
        both = tensor.reshape(heads, first + second, -1).transpose(2, 0, 1)
        return [both[..., :first], both[..., first:]]

    def save(arrays):
        both = np.concatenate(arrays, -1).transpose(1, 2, 0)
        return both.reshape(-1, both.shape[-1])

    return Layout(load=load, save=save)
