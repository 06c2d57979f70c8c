"""Named TPU targets to compile for on a machine that has none.

libtpu holds the whole TPU compiler and runs on any x86-64 Linux machine, so a program can be
compiled, and its schedule and memory read, for a slice of any generation it knows. Nothing runs.
The process keeps its own default backend, usually the CPU: start it with JAX_PLATFORMS=cpu.

A target is `generation:topology`, the topology in chips, as Cloud TPU spells it. A v5e, v6e or v5p
chip is one JAX device, a 7x chip is two.
"""

import dataclasses
import functools
import importlib.util
import os
from typing import Literal

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A slice of TPU chips that libtpu can compile for."""

    name: str
    generation: str
    topology: str  # as libtpu 0.0.42 spells it
    num_devices: int

    @property
    def single_chip(self) -> bool:
        return set(self.name.partition(":")[2].split("x")) == {"1"}


def _targets() -> dict[str, Target]:
    # generation -> libtpu's name, devices per chip, topologies
    cubes = ("4x4x8", "4x8x8", "8x8x8")
    known = {
        "v5e": ("v5e", 1, ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
        "v6e": ("v6e", 1, ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
        "v5p": ("v5p", 1, ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "4x4x4", *cubes)),
        "7x": ("tpu7x", 2, ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "4x4x4")),
    }
    targets = {}
    for generation, (libtpu_name, per_chip, layouts) in known.items():
        for layout in layouts:
            chips = 1
            for side in layout.split("x"):
                chips *= int(side)
            name = f"{generation}:{layout}"
            targets[name] = Target(
                name=name,
                generation=generation,
                topology=f"{libtpu_name}:{layout}",
                num_devices=chips * per_chip,
            )
    return targets


TARGETS: dict[str, Target] = _targets()

# What libtpu asks the machine about when it is not told. The accelerator type must only be a valid
# one: the topology that we pass decides what is compiled for.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Otherwise a lock file stops the second of two processes.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def get_target(name: str) -> Target:
    """The target called `name`; raises `InputError` that lists the known ones."""
    if name not in TARGETS:
        raise InputError(f"target={name!r} is not one of {', '.join(TARGETS)}")
    return TARGETS[name]


@functools.cache
def target_devices(name: str) -> tuple[jax.Device, ...]:
    """Compile-only devices of a target. They can be sharded over, but hold no arrays.

    Raises `InputError` for an unknown target and when libtpu is missing. Cost: libtpu loads once
    per process, about a second.
    """
    target = get_target(name)
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise InputError(
            f"target={name!r} wants libtpu, which is not installed: "
            "pip install -r requirements-dev.txt"
        )
    jax.devices()  # the process's own backends start before libtpu is told that it has no machine
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # By default a host holds 2x2 chips, which one chip cannot be divided into.
    options = {"chips_per_host_bounds": (1, 1, 1)} if target.single_chip else {}
    topology = topologies.get_topology_desc(target.topology, platform="tpu", **options)
    return tuple(topology.devices)


def target_mesh(
    name: str,
    *,
    data: int = 1,
    expert: int = 1,
    model: int = 1,
    axis_type: Literal["auto", "explicit"] = "auto",
) -> Mesh:
    """`core.mesh.make_mesh` over a target's devices; raises `InputError` when they are too few."""
    devices = list(target_devices(name))
    return make_mesh(data=data, expert=expert, model=model, axis_type=axis_type, devices=devices)
