"""Floating-point operations of the matrix products in a compiled program."""

import math
import re

from moejax.aot.hlo import Instruction, Module

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
# XLA:GPU hands large products to cuBLAS, with the same facts in a JSON.
_CUBLAS_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([\d,"]*)\]')
_KERNEL = re.compile(r"dim_labels=\w+_(\w+)->")


def flops(module: Module, computation: str, instruction: Instruction) -> int:
    """Two per multiply-add of `instruction` in `computation`, and of all that it calls.

    Exact for `dot`, and for `convolution` without padding, which is how XLA:TPU writes a plain
    product. A loop counts one trip and a conditional all its branches; custom calls other than
    cuBLAS count nothing, nor do products that XLA turned into a multiply and a reduction.
    """
    types = {one.name: one for one in module.computations[computation]}
    is_cublas = instruction.target.startswith("__cublas")
    if instruction.opcode == "dot" or is_cublas:
        match = (_CUBLAS_CONTRACTED if is_cublas else _CONTRACTED).search(instruction.line)
        dims = types[instruction.operands[0]].arrays[0].dims
        axes = match[1].replace('"', "").split(",") if match else ()
        depth = math.prod(dims[int(axis)] for axis in axes if axis)
        return 2 * math.prod(instruction.arrays[0].dims) * depth
    if instruction.opcode == "convolution":
        match = _KERNEL.search(instruction.line)
        kernel = types[instruction.operands[1]].arrays[0].dims
        labels = match[1] if match else "io"
        depth = math.prod(dim for dim, label in zip(kernel, labels, strict=True) if label != "o")
        return 2 * math.prod(instruction.arrays[0].dims) * depth
    return sum(
        flops(module, name, one)
        for name in instruction.called
        for one in module.computations.get(name, ())
    )
