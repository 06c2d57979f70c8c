"""What the collectives of a compiled program move, and behind which computation.

Read from scheduled HLO, on whatever compiler made it: XLA:CPU, or a TPU that is not there. Bytes
are those on the wire, padding of capacities and of ranks that send zeros included; the rung is
*schedule*, never a time. Everything is counted once per run of its computation: once per trip of a
loop.
"""

import dataclasses

from jax.sharding import Mesh

from moejax.aot.collectives import (
    Collective,
    collectives,
    device_groups,
    device_pairs,
)
from moejax.aot.flops import flops
from moejax.aot.hlo import Instruction, Module
from moejax.collectives.schedule import crossed_axis
from moejax.collectives.traffic import Traffic

_COMPUTE = ("fusion", "dot", "convolution", "custom-call", "while", "conditional", "call")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flight:
    """One collective and what the program issues between its start and its end."""

    collective: Collective
    start: int  # position in its computation
    done: int  # the same as start when synchronous
    in_flight: int  # collectives under way once it has started, itself included; 0 if synchronous
    computes: int  # fusions, products, custom calls and control flow issued meanwhile
    flops: int  # of the matrix products in them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """The collectives of one program."""

    traffic: dict[tuple[str, str], Traffic]  # by kind and axis; all devices together
    flights: tuple[Flight, ...]

    @property
    def max_in_flight(self) -> int:
        return max((one.in_flight for one in self.flights), default=0)

    @property
    def overlapped(self) -> tuple[Flight, ...]:
        """Those with computation between start and end."""
        return tuple(one for one in self.flights if one.computes)


def inspect_collectives(module: Module, mesh: Mesh) -> Inspection:
    """Facts of a program compiled for `mesh`, from `parse_hlo(compiled.as_text())`.

    A message is charged to the outermost axis that it crosses, as in `traffic.traffic`; where the
    mesh has further axes, each of their coordinates runs the schedule once. A native collective
    is charged as if every rank sent directly to every other one of its group, the total of any
    optimal algorithm; an all-reduce as reduce-scatter and all-gather; a ragged all-to-all as if
    its buffers were full.
    """
    found = collectives(module, mesh)
    total: dict[tuple[str, str], Traffic] = {}
    for one in found:
        for axis, moved in _wire(one, mesh).items():
            key = one.kind, axis
            total[key] = total.get(key, Traffic()) + moved
    return Inspection(traffic=total, flights=_flights(module, found))


def _wire(collective: Collective, mesh: Mesh) -> dict[str, Traffic]:
    """Messages and bytes per axis of one collective."""
    pairs, share = _pairs(collective.kind, collective.line, mesh.size)
    counts: dict[str, int] = {}
    for src, dst in pairs:
        axis = crossed_axis(src, dst, mesh.devices.shape)
        if axis is not None:
            name = mesh.axis_names[axis]
            counts[name] = counts.get(name, 0) + 1
    times, parts = share
    return {
        axis: Traffic(messages=count, nbytes=count * collective.nbytes * times // parts)
        for axis, count in counts.items()
    }


def _pairs(kind: str, line: str, num_devices: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Who sends to whom, and which fraction of the collective's bytes each time."""
    if kind == "collective-permute":
        return device_pairs(line), (1, 1)
    groups = device_groups(line, num_devices)
    if kind == "collective-broadcast":
        return [(group[0], other) for group in groups for other in group[1:]], (1, 1)
    pairs = [(a, b) for group in groups for a in group for b in group if a != b]
    return pairs, (2 if kind == "all-reduce" else 1, len(groups[0]))


def _flights(module: Module, found: tuple[Collective, ...]) -> tuple[Flight, ...]:
    by_computation: dict[str, list[Collective]] = {}
    for one in found:
        by_computation.setdefault(one.computation, []).append(one)
    result = []
    for name, chosen in by_computation.items():
        spans = _spans(module.computations[name])
        for one in chosen:
            start, done = spans[one.name]
            between = module.computations[name][start + 1 : done]
            others = (spans[other.name] for other in chosen if other.is_async)
            result.append(
                Flight(
                    collective=one,
                    start=start,
                    done=done,
                    in_flight=sum(s <= start < d for s, d in others) if one.is_async else 0,
                    computes=sum(_is_compute(instruction) for instruction in between),
                    flops=sum(flops(module, name, instruction) for instruction in between),
                )
            )
    return tuple(result)


def _spans(computation: tuple[Instruction, ...]) -> dict[str, tuple[int, int]]:
    """Name of every instruction to the positions of its start and its end."""
    dones = {
        one.operands[0]: position
        for position, one in enumerate(computation)
        if one.opcode.endswith("-done") and one.operands
    }
    return {
        one.name: (position, dones.get(one.name, position))
        for position, one in enumerate(computation)
    }


def _is_compute(instruction: Instruction) -> bool:
    # XLA:TPU writes an allocation as a custom call.
    return instruction.opcode in _COMPUTE and instruction.target != "AllocateBuffer"


def cross_slice_bytes(module: Module) -> int:
    """Bytes that each device sends to another slice in a program for several TPU slices.

    XLA:TPU hands what leaves a slice to its host: sends to the megascale runtime, whatever the
    collective was.
    """
    sent = 0
    for computation in module.computations.values():
        for one in computation:
            if one.opcode == "send" and "xla_megascale" in one.line:
                sent += one.arrays[0].nbytes
    return sent
