"""Collectives of a compiled program: kind, mesh axes, bytes."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from moejax.aot.hlo import Instruction, Module, parse_arrays, tuple_elements

KINDS = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_PERMUTATION = re.compile(r"source_target_pairs=(\{[\d,{}]*\})")
_GROUPS = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{[\d,{}]*\})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective, each time its computation runs."""

    name: str
    kind: str
    axes: tuple[str, ...]  # mesh axes it runs over
    nbytes: int  # per device: the larger of what goes in and what comes out
    is_async: bool
    computation: str
    scope: str
    line: str  # the text that names its groups or pairs


def collectives(module: Module, mesh: Mesh) -> tuple[Collective, ...]:
    """All collectives of a program that was compiled for `mesh`, in schedule order."""
    found = []
    for name in module.scheduled():
        computation = module.computations[name]
        types = {instruction.name: instruction for instruction in computation}
        for instruction in computation:
            kind, inner = _collective_in(module, instruction)
            if kind is None:
                continue
            found.append(
                Collective(
                    name=instruction.name,
                    kind=kind,
                    axes=mesh_axes(inner.line, mesh),
                    nbytes=_payload(inner, types),
                    is_async=instruction.opcode.endswith("-start"),
                    computation=name,
                    scope=instruction.scope,
                    line=inner.line,
                )
            )
    return tuple(found)


def _collective_in(module: Module, instruction: Instruction) -> tuple[str | None, Instruction]:
    """Kind of an instruction that is a collective, or a fusion around one, and the collective.

    XLA:TPU writes a reduce-scatter as a fusion of an all-reduce and a slice.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        return kind, instruction
    if instruction.opcode == "fusion":
        for name in instruction.called:
            for one in module.computations.get(name, ()):
                if one.opcode in KINDS:
                    return "reduce-scatter" if one.opcode == "all-reduce" else one.opcode, one
    return None, instruction


def _payload(instruction: Instruction, types: dict[str, Instruction]) -> int:
    result = instruction.type
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        result = tuple_elements(result)[1]  # (operands, results, context...)
    received = sum(array.nbytes for array in parse_arrays(result))
    known = (types[name] for name in instruction.operands if name in types)
    sent = sum(array.nbytes for one in known for array in one.arrays)
    return max(received, sent)


def mesh_axes(line: str, mesh: Mesh) -> tuple[str, ...]:
    """Mesh axes that the groups or pairs in an instruction's text run over.

    Ids in the text are positions in `mesh.devices`, flattened. Returns `("?",)` when the groups are
    those of no set of axes.
    """
    coordinates = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=1)
    if pairs := device_pairs(line):
        differs = np.any([coordinates[a] != coordinates[b] for a, b in pairs], axis=0)
        return tuple(name for name, d in zip(mesh.axis_names, differs, strict=True) if d)
    wanted = {frozenset(group) for group in device_groups(line, mesh.size)}
    for count in range(len(mesh.axis_names) + 1):
        for axes in itertools.combinations(range(len(mesh.axis_names)), count):
            if all(mesh.devices.shape[axis] > 1 for axis in axes) and wanted == _groups_of(
                coordinates, axes
            ):
                return tuple(mesh.axis_names[axis] for axis in axes)
    return ("?",)


def device_pairs(line: str) -> list[tuple[int, int]]:
    """(source, target) positions in the mesh of a permutation's text; empty for other kinds."""
    match = _PERMUTATION.search(line)
    return [(a, b) for a, b in _braces(match[1])] if match else []


def device_groups(line: str, num_devices: int) -> list[list[int]]:
    """Groups of mesh positions in a collective's text; all devices when it names none."""
    match = _GROUPS.search(line)
    groups = _parse_groups(match[1]) if match else []
    return groups or [list(range(num_devices))]


def _groups_of(coordinates: np.ndarray, axes: Sequence[int]) -> set[frozenset[int]]:
    """Devices that differ only along `axes`, grouped."""
    others = np.delete(coordinates, axes, axis=1)
    groups: dict[tuple[int, ...], set[int]] = {}
    for device, key in enumerate(others):
        groups.setdefault(tuple(key), set()).add(device)
    return {frozenset(group) for group in groups.values()}


def _parse_groups(text: str) -> list[list[int]]:
    """`{{0,1},{2,3}}` or `[2,2]<=[4]`, also with a transpose, `[2,2]<=[2,2]T(1,0)`."""
    if text.startswith("{"):
        return _braces(text)
    shape, dims, *order = (
        [int(n) for n in part.split(",")] for part in re.findall(r"[\[(]([\d,]+)[\])]", text)
    )
    ids = np.arange(np.prod(dims)).reshape(dims)
    return (ids.transpose(order[0]) if order else ids).reshape(shape).tolist()


def _braces(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
