"""Bytes that one step sends over each mesh axis, read from its compiled program.

Rung *schedule*: padding is counted, time is not. Bodies of loops count once per trip.
"""

import collections
import dataclasses
import re

from jax.sharding import Mesh

from moejax.aot.hlo import Instruction, Module
from moejax.collectives.inspect import inspect_collectives

_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
_CONTROL = ("while", "conditional", "call")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTraffic:
    """Of one run of a program.

    Attributes:
        nbytes: by mesh axis, of all devices together.
        unknown_loops: loops with collectives whose trips the compiler does not know, counted as
            one; where there are any, `nbytes` is a lower bound.
    """

    nbytes: dict[str, int]
    unknown_loops: int


def step_traffic(module: Module, mesh: Mesh) -> StepTraffic:
    """Facts of a program compiled for `mesh`, from `parse_hlo(compiled.as_text())`.

    All branches of a conditional are counted.
    """
    nbytes = dict.fromkeys(mesh.axis_names, 0)
    unknown = 0
    for name, (times, is_known) in _runs(module).items():
        flat = tuple(one for one in module.computations[name] if one.opcode not in _CONTROL)
        alone = Module(computations={name: flat}, entry=name)
        traffic = inspect_collectives(alone, mesh).traffic
        unknown += bool(traffic) and not is_known
        for (_, axis), moved in traffic.items():
            nbytes[axis] += times * moved.nbytes
    return StepTraffic(nbytes=nbytes, unknown_loops=unknown)


def _runs(module: Module) -> dict[str, tuple[int, bool]]:
    """How often each computation runs, and whether that is known."""
    runs: dict[str, tuple[int, bool]] = collections.defaultdict(lambda: (0, True))
    todo = [(module.entry, 1, True)]
    while todo:
        name, times, is_known = todo.pop()
        before, was_known = runs[name]
        runs[name] = before + times, was_known and is_known
        for one in module.computations[name]:
            if one.opcode in _CONTROL:
                trips = _trips(one)
                inner = times * (trips or 1), is_known and trips is not None
                todo.extend((called, *inner) for called in one.called)
    return dict(runs)


def _trips(instruction: Instruction) -> int | None:
    if instruction.opcode != "while":
        return 1
    match = _TRIPS.search(instruction.line)
    return int(match[1]) if match else None
