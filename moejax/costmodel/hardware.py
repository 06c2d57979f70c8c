"""Accelerators by name: the few numbers that bounds are made of.

Everything is per chip (a GPU, or a TPU chip, of which a 7x makes two JAX devices), in bytes, bytes
per second and operations per second. A *datasheet* figure is the vendor's peak and is never
reached; an *assumed* figure is ours, and a run on the machine should replace it.
"""

import dataclasses
from typing import Literal

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
    devices_per_chip: int = 1


# TPU: the pages v5e, v5p, v6e and tpu7x of docs.cloud.google.com/tpu/docs. Their "bidirectional
# inter-chip interconnect bandwidth per chip" is halved here. They say nothing about the host link:
# PCIe 3.0 x16 (15.75e9) is assumed for v5e and v5p, 4.0 (31.5e9) for v6e, 5.0 (63e9) for 7x.
# GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM, and the Ada architecture paper
# (RTX 4090). PCIe rates are those of 16 lanes after line coding. NVLink totals of 600e9 and 900e9
# count both directions, halved here.
_CHIPS = (
    Chip(
        name="v5e",
        jax_kinds=("TPU v5 lite", "TPU v5e"),
        bf16_flops=197e12,
        hbm_bytes=16 * 2**30,
        hbm_bytes_per_s=819e9,
        link_bytes_per_s=15.75e9,
        link="assumed",
        interconnect_bytes_per_s=200e9,
    ),
    Chip(
        name="v5p",
        jax_kinds=("TPU v5", "TPU v5p"),
        bf16_flops=459e12,
        hbm_bytes=95 * 2**30,
        hbm_bytes_per_s=2765e9,
        link_bytes_per_s=15.75e9,
        link="assumed",
        interconnect_bytes_per_s=600e9,
    ),
    Chip(
        name="v6e",
        jax_kinds=("TPU v6 lite", "TPU v6e"),
        bf16_flops=918e12,
        hbm_bytes=32 * 2**30,
        hbm_bytes_per_s=1638e9,
        link_bytes_per_s=31.5e9,
        link="assumed",
        interconnect_bytes_per_s=400e9,
    ),
    Chip(
        name="7x",
        jax_kinds=("TPU7x",),
        bf16_flops=2307e12,
        hbm_bytes=192 * 2**30,
        hbm_bytes_per_s=7380e9,
        link_bytes_per_s=63e9,
        link="assumed",
        interconnect_bytes_per_s=600e9,
        devices_per_chip=2,
    ),
    Chip(
        name="A100",
        jax_kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        bf16_flops=312e12,
        hbm_bytes=80e9,
        hbm_bytes_per_s=2039e9,
        link_bytes_per_s=31.5e9,
        link="datasheet",
        interconnect_bytes_per_s=300e9,
    ),
    Chip(
        name="H100",
        jax_kinds=("NVIDIA H100 80GB HBM3",),
        bf16_flops=989e12,
        hbm_bytes=80e9,
        hbm_bytes_per_s=3350e9,
        link_bytes_per_s=63e9,
        link="datasheet",
        interconnect_bytes_per_s=450e9,
    ),
    Chip(
        name="H200",
        jax_kinds=("NVIDIA H200",),
        bf16_flops=989e12,
        hbm_bytes=141e9,
        hbm_bytes_per_s=4800e9,
        link_bytes_per_s=63e9,
        link="datasheet",
        interconnect_bytes_per_s=450e9,
    ),
    Chip(
        name="RTX4090",
        jax_kinds=("NVIDIA GeForce RTX 4090",),
        bf16_flops=165e12,
        hbm_bytes=24e9,
        hbm_bytes_per_s=1008e9,
        link_bytes_per_s=31.5e9,
        link="datasheet",
        interconnect_bytes_per_s=31.5e9,  # PCIe: it has no NVLink
    ),
)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _CHIPS}


def get_chip(name: str) -> Chip:
    """The chip called `name` (`v5e`) or whose JAX devices are of that kind (`TPU v5 lite`).

    Raises `InputError` that lists the known names.
    """
    for chip in _CHIPS:
        if name == chip.name or name in chip.jax_kinds:
            return chip
    raise InputError(f"hardware {name!r} is not one of {', '.join(CHIPS)}")
