"""Accelerators by name: the few numbers that bounds are made of.

Everything is per chip (a GPU, or a TPU chip, of which a 7x makes two JAX devices), in bytes, bytes
per second and operations per second. A *datasheet* figure is the vendor's peak and is never
reached; an *assumed* figure is ours, and a run on the machine should replace it. A `Machine` is a
chip in a host: what offloaded experts cost depends on both.
"""

import dataclasses
from typing import Any, Literal

from moejax.core.errors import InputError

Provenance = Literal["datasheet", "assumed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak rates of one chip."""

    name: str
    jax_kinds: tuple[str, ...]  # `jax.Device.device_kind`
    bf16_flops: float  # dense, operations per second
    hbm_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # host to device, one direction
    link: Provenance
    interconnect_bytes_per_s: float  # to other chips, all ports, one direction
    devices_per_chip: int


# TPU: the pages v5e, v5p, v6e and tpu7x of docs.cloud.google.com/tpu/docs. Their "bidirectional
# inter-chip interconnect bandwidth per chip" is halved here. They say nothing about the host link:
# PCIe 3.0 x16 (15.75e9) is assumed for v5e and v5p, 4.0 (31.5e9) for v6e, 5.0 (63e9) for 7x.
# GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM, and the Ada architecture paper
# (RTX 4090). PCIe rates are those of 16 lanes after line coding. NVLink totals of 600e9 and 900e9
# count both directions, halved here.
_GIB = 2**30
# fmt: off
_COLUMNS = (
    "name", "bf16_flops", "hbm_bytes", "hbm_bytes_per_s", "link_bytes_per_s", "link",
    "interconnect_bytes_per_s", "devices_per_chip", "jax_kinds",
)
_ROWS = (
    ("v5e",   197e12,  16 * _GIB,  819e9, 15.75e9, "assumed", 200e9, 1, ("TPU v5 lite", "TPU v5e")),
    ("v5p",   459e12,  95 * _GIB, 2765e9, 15.75e9, "assumed", 600e9, 1, ("TPU v5", "TPU v5p")),
    ("v6e",   918e12,  32 * _GIB, 1638e9, 31.5e9,  "assumed", 400e9, 1, ("TPU v6 lite", "TPU v6e")),
    ("7x",   2307e12, 192 * _GIB, 7380e9, 63e9,    "assumed", 600e9, 2, ("TPU7x",)),
    ("A100",  312e12,  80e9, 2039e9, 31.5e9, "datasheet", 300e9, 1,
     ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
    ("H100",  989e12,  80e9, 3350e9, 63e9,   "datasheet", 450e9, 1, ("NVIDIA H100 80GB HBM3",)),
    ("H200",  989e12, 141e9, 4800e9, 63e9,   "datasheet", 450e9, 1, ("NVIDIA H200",)),
    # No NVLink: PCIe is the interconnect too.
    ("RTX4090", 165e12, 24e9, 1008e9, 31.5e9, "datasheet", 31.5e9, 1,
     ("NVIDIA GeForce RTX 4090",)),
)
# fmt: on
_CHIPS = tuple(Chip(**dict[str, Any](zip(_COLUMNS, row, strict=True))) for row in _ROWS)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _CHIPS}


def get_chip(name: str) -> Chip:
    """The chip called `name` (`v5e`) or whose JAX devices are of that kind (`TPU v5 lite`).

    Raises `InputError` that lists the known names.
    """
    for chip in _CHIPS:
        if name == chip.name or name in chip.jax_kinds:
            return chip
    raise InputError(f"hardware {name!r} is not one of {', '.join(CHIPS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """One chip and its share of a host. Peak rates; plan with `link_rate` and `host_rate`."""

    name: str
    chip: Chip
    link_bytes_per_s: float  # host to device, one direction
    dram_bytes_per_s: float  # of host memory
    host_flops_per_s: float  # float32 multiply-adds of vector units

    @property
    def link_rate(self) -> float:
        """Bytes per second that transfers reach."""
        return REACHED * self.link_bytes_per_s

    @property
    def host_rate(self) -> float:
        """Bytes per second that cores read beside a busy link: both draw on the same memory."""
        return min(REACHED * self.dram_bytes_per_s, self.dram_bytes_per_s - self.link_rate)


# Assumed: PreScope (arXiv 2509.23638) uses 79 % of PCIe, STREAM reaches about as much of DRAM.
REACHED = 0.8
# Memory is channels x 8 bytes x transfers per second, arithmetic cores x clock x 32 (AVX2) or
# 64 (AVX-512); matrix units (AMX) are not counted. Desktops: 2 channels of DDR4-3200 and 8 cores of
# 4.0 GHz, 2 of DDR5-5600 and 16 of 4.5 GHz. Servers: data sheets of EPYC 7763 (8 of DDR4-3200, 64
# cores of 2.45 GHz) and Xeon 8480+ (8 of DDR5-4800, 56 cores of 2.0 GHz). TPU hosts: machine types
# ct5lp and ct6e of docs.cloud.google.com have 24 and 44 hardware threads per chip; that a chip has
# an eighth of two sockets of 8 x DDR4-3200 or of 12 x DDR5-4800 is assumed.
_MACHINES = (
    ("RTX4090-PCIe3", "RTX4090", 15.75e9, 51.2e9, 1.0e12),
    ("RTX4090-PCIe4", "RTX4090", 31.5e9, 89.6e9, 2.3e12),
    ("A100-PCIe4", "A100", 31.5e9, 204.8e9, 5.0e12),
    ("H100-PCIe5", "H100", 63e9, 307.2e9, 7.2e12),
    ("v5e-host", "v5e", 15.75e9, 51.2e9, 0.86e12),
    ("v6e-host", "v6e", 31.5e9, 115.2e9, 1.7e12),
)
MACHINES: dict[str, Machine] = {
    name: Machine(
        name=name,
        chip=CHIPS[chip],
        link_bytes_per_s=link,
        dram_bytes_per_s=dram,
        host_flops_per_s=flops,
    )
    for name, chip, link, dram, flops in _MACHINES
}


def get_machine(name: str) -> Machine:
    """The machine called `name`; `InputError` that lists the known ones."""
    if name not in MACHINES:
        raise InputError(f"hardware row {name!r} is not one of {', '.join(MACHINES)}")
    return MACHINES[name]
