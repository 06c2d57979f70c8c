"""What a compiled program moves, and behind which computation: facts from its scheduled HLO.

An asynchronous transfer is a pair of instructions, `*-start` and `*-done`. Everything that is
issued between them can hide it, so the schedule alone says whether a prefetch overlaps the expert
computation; how long either takes, it does not say. Instructions carry the path of the
`jax.named_scope`s that they come from, which tells a prefetch from a demand fetch.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Literal, TypeVar

from moejax.aot.hlo import HOST_SPACE, Array, Instruction, Module, parse_arrays, tuple_elements
from moejax.core.errors import check

_MATMULS = ("dot_general", "ragged_dot_general", "conv_general_dilated", "pallas_call")
# Instructions that hand on a buffer, or write a part of one in place.
_PASS_THROUGH = frozenset(
    "parameter get-tuple-element tuple bitcast while conditional call optimization-barrier "
    "dynamic-update-slice dynamic-update-slice-start add-dependency".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """One copy between host and device memory, each time its computation runs."""

    name: str
    computation: str
    scope: str
    direction: Literal["host_to_device", "device_to_host"]
    nbytes: int
    start: int  # position in the computation
    done: int  # the same as start when synchronous


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostCompute:
    """One call of the host's processor (`compute_on`, or by accident), asynchronous or not."""

    name: str
    computation: str
    start: int  # position in the computation
    done: int  # the same as start when synchronous


Span = TypeVar("Span", Transfer, HostCompute)


def transfers(module: Module) -> tuple[Transfer, ...]:
    """All transfers between host and device memory, in schedule order per computation."""
    found = []
    for name in module.scheduled():
        computation = module.computations[name]
        types = {instruction.name: instruction for instruction in computation}
        dones = {
            instruction.operands[0]: position
            for position, instruction in enumerate(computation)
            if instruction.opcode.endswith("-done")
        }
        for position, instruction in enumerate(computation):
            ends = _endpoints(instruction, types)
            if ends is None:
                continue
            source, destination, moved = ends
            if (source.space == HOST_SPACE) == (destination.space == HOST_SPACE):
                continue
            done = position
            if instruction.opcode.endswith("-start"):
                check(instruction.name in dones, f"{instruction.name} has no done in {name}")
                done = dones[instruction.name]
            to_device = source.space == HOST_SPACE
            found.append(
                Transfer(
                    name=instruction.name,
                    computation=name,
                    scope=instruction.scope,
                    direction="host_to_device" if to_device else "device_to_host",
                    nbytes=moved.nbytes,
                    start=position,
                    done=done,
                )
            )
    return tuple(found)


def host_computes(module: Module) -> tuple[HostCompute, ...]:
    """All calls of the host's processor, in schedule order per computation."""
    found = []
    for name in module.scheduled():
        computation = module.computations[name]
        for start, one in enumerate(computation):
            if one.target != "HostExecute" or one.opcode == "custom-call-done":
                continue
            ends = [
                at
                for at, other in enumerate(computation)
                if other.opcode == "custom-call-done" and one.name in other.operands
            ]
            found.append(
                HostCompute(
                    name=one.name, computation=name, start=start, done=ends[0] if ends else start
                )
            )
    return tuple(found)


def _endpoints(
    instruction: Instruction, types: dict[str, Instruction]
) -> tuple[Array, Array, Array] | None:
    """(source, destination, what is moved) of a copy or slice, else None."""
    opcode = instruction.opcode
    if opcode == "copy-start":
        destination, source = instruction.arrays[:2]
        return source, destination, destination
    # On GPU a slice is a fusion.
    slices = ("dynamic-slice-start", "slice-start", "dynamic-update-slice-start", "fusion-start")
    if opcode in slices:
        inputs, result = tuple_elements(instruction.type)[:2]
        operands = parse_arrays(inputs)
        (destination,) = parse_arrays(result)
        if opcode == "dynamic-update-slice-start":
            return operands[1], destination, operands[1]
        return operands[0], destination, destination
    if opcode in ("copy", "dynamic-slice", "slice"):
        source = types[instruction.operands[0]].arrays[0]
        return source, instruction.arrays[0], instruction.arrays[0]
    return None


class Work:
    """Which instructions of a module do matrix products, directly or in what they call.

    A product is recognised by its opcode or by the primitive it came from: at few rows XLA:TPU
    turns a matrix product into a multiply and a reduction.
    """

    def __init__(self, module: Module):
        self._module = module
        self._computation_has = functools.cache(self._find)

    def is_matmul(self, instruction: Instruction, scope: str = "") -> bool:
        """Whether it multiplies matrices under a named scope that contains `scope`."""
        if self._is_direct(instruction) and scope in instruction.scope:
            return True
        if instruction.target == "HostExecute":  # runs on the host, beside the device
            return False
        return any(self._computation_has(name, scope) for name in instruction.called)

    def positions(self, computation: str, scope: str = "") -> tuple[int, ...]:
        """Where in a computation matrix work under `scope` is issued."""
        instructions = self._module.computations[computation]
        return tuple(i for i, one in enumerate(instructions) if self.is_matmul(one, scope))

    def _find(self, computation: str, scope: str) -> bool:
        return any(self.is_matmul(one, scope) for one in self._module.computations[computation])

    def _is_direct(self, instruction: Instruction) -> bool:
        if instruction.opcode in ("dot", "convolution") or instruction.target == "tpu_custom_call":
            return True
        primitive = instruction.scope.rpartition("/")[2]
        return instruction.opcode in ("fusion", "reduce", "custom-call") and primitive in _MATMULS


def overlapped(module: Module, chosen: Iterable[Span], compute_scope: str) -> tuple[Span, ...]:
    """Those that start before and finish after all matrix work under `compute_scope`.

    Judged within the computation of a transfer or host call (one loop body, one branch), which must
    hold some such work: what is alone in its computation hides behind nothing.
    """
    work = Work(module)
    result = []
    for one in chosen:
        positions = work.positions(one.computation, compute_scope)
        if positions and one.start < positions[0] and positions[-1] < one.done:
            result.append(one)
    return tuple(result)


def whole_copies(module: Module, shape: Iterable[int]) -> tuple[Instruction, ...]:
    """Instructions that write a whole new buffer of `shape`, in whatever dtype or order of axes.

    Copies, transposes, conversions and fusions count, between memories too; an update in place does
    not. `shape` is that of one device. Axes of size 1 do not matter.
    """
    wanted = _essence(shape)
    return tuple(
        instruction
        for _, _, instruction in module.instructions()
        if any(_essence(array.dims) == wanted for array in _written(module, instruction))
    )


def _essence(dims: Iterable[int]) -> list[int]:
    return sorted(dim for dim in dims if dim != 1)


def _written(module: Module, instruction: Instruction) -> tuple[Array, ...]:
    """The arrays that an instruction writes in full."""
    opcode = instruction.opcode
    if opcode in _PASS_THROUGH or opcode.endswith("-done"):
        return ()
    if instruction.target == "AllocateBuffer":
        return ()
    if opcode == "copy-start":
        return instruction.arrays[:1]
    if opcode.endswith("-start"):
        return parse_arrays(tuple_elements(instruction.type)[1])
    if opcode == "fusion":
        return _written_by_fusion(module, instruction)
    return instruction.arrays


def _written_by_fusion(module: Module, fusion: Instruction) -> tuple[Array, ...]:
    body = {one.name: one for one in module.computations[fusion.called[0]]}
    (root,) = [one for one in body.values() if one.is_root]
    outputs = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    written: tuple[Array, ...] = ()
    for output in outputs:
        if output.opcode == "fusion":
            written += _written_by_fusion(module, output)
        elif not _updates_in_place(body, output):
            written += output.arrays
    return written


def _updates_in_place(body: dict[str, Instruction], output: Instruction) -> bool:
    """Whether an output of a fusion is one of its parameters, possibly with a slice replaced."""
    while output.opcode in ("bitcast", "dynamic-update-slice"):
        output = body[output.operands[0]]
    return output.opcode == "parameter"


def count_host_callbacks(module: Module) -> int:
    """Calls of Python or other host functions from within the program."""
    return sum(
        "callback" in one.target
        or one.opcode in ("infeed", "outfeed")
        or (one.opcode == "send" and "is_host_transfer=true" in one.line)
        for one in _all(module)
    )


def _all(module: Module) -> Iterable[Instruction]:
    return (instruction for _, _, instruction in module.instructions())
