"""Compile for GPUs on a machine that has none.

The CUDA plugin of jax holds the whole XLA:GPU compiler and needs no driver to compile. Its version
must be that of jaxlib, and it is kept in an environment of its own (`scripts/gpu_compiler.sh`),
because where it is installed jax looks for a GPU. Its devices know no memory kinds, so a program is
traced and lowered over CPU devices, and the module compiled for as many GPUs. Without a GPU nothing
is timed, so the compiler takes its default kernels; order and bytes are those of a real run.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from moejax.aot.compile import CompiledFacts, memory_facts
from moejax.aot.hlo import Module, parse_hlo
from moejax.core.errors import InputError

# What the compiler wants to know of a GPU: NVIDIA's data sheet of the H100 SXM5 80 GB, and the
# limits of compute capability 9.0 in the CUDA C++ Programming Guide.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  threads_per_core_limit: 2048
  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84942979072  pcie_bandwidth: 34359738368  device_address_bits: 64
  cuda_compute_capability { major: 9  feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation"  name: "NVIDIA H100 80GB HBM3"
  platform_version: "Compute Capability 9.0a"
  driver_version: "13.0.0"  runtime_version: "12.8.0"  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9  minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def _devices(count: int) -> tuple[jax.Device, ...]:
    # `find_spec` raises where the package around a module is missing.
    if not all(map(importlib.util.find_spec, ("jax_plugins", "jax_plugins.xla_cuda12"))):
        raise InputError(
            "compiling for a GPU wants jax's CUDA plugin, which is not installed: "
            "source scripts/gpu_compiler.sh"
        )
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology=f"1x1x{count}"
    )
    return tuple(topology.devices)


def compile_for_h100(
    fn: Callable[..., Any],
    abstract_args: Sequence[Any],
    *,
    compiler_options: dict[str, Any] | None = None,
) -> Module:
    """The scheduled program of `fn(*abstract_args)` on H100s, see `facts_for_h100`."""
    return facts_for_h100(fn, abstract_args, compiler_options=compiler_options).module


def facts_for_h100(
    fn: Callable[..., Any],
    abstract_args: Sequence[Any],
    *,
    compiler_options: dict[str, Any] | None = None,
) -> CompiledFacts:
    """`fn(*abstract_args)` as compiled for H100s of one host, one per device.

    Args:
        fn: a function, or one already wrapped in `jax.jit` with its own donation.
        abstract_args: trees of `ShapeDtypeStruct`s over a mesh of CPU devices, which stand for the
            GPUs in mesh order.
        compiler_options: XLA flags without their dashes.

    Raises `InputError` where the plugin is missing. Cost: seconds; nothing runs.
    """
    devices = _devices(_num_devices(abstract_args))
    jitted = fn if isinstance(fn, jax.stages.Wrapped) else jax.jit(fn)
    lowered = jitted.trace(*abstract_args).lower(lowering_platforms=("cuda",))
    executable = devices[0].client.compile(  # pyrefly: ignore[missing-attribute]
        lowered.compiler_ir("stablehlo"),
        executable_devices=_device_list(devices),
        compile_options=_compile_options(devices, compiler_options or {}),
    )
    text = "\n".join(module.to_string() for module in executable.hlo_modules())
    return CompiledFacts(
        module=parse_hlo(text),
        mesh=jax.tree.leaves(tuple(abstract_args))[0].sharding.mesh,
        memory=memory_facts(executable.get_compiled_memory_stats()),
    )


def _num_devices(abstract_args: Sequence[Any]) -> int:
    counts = {leaf.sharding.mesh.size for leaf in jax.tree.leaves(tuple(abstract_args))}
    if len(counts) != 1:
        raise InputError(
            f"abstract arguments want one mesh, got meshes of {sorted(counts)} devices"
        )
    return counts.pop()


def _device_list(devices: tuple[jax.Device, ...]) -> Any:
    from jax._src.lib import xla_client  # noqa: PLC0415  (private: only where it is needed)

    return xla_client.DeviceList(devices)


def _compile_options(devices: tuple[jax.Device, ...], overrides: dict[str, Any]) -> Any:
    from jax._src import compiler  # noqa: PLC0415

    options = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=len(devices),
        device_assignment=np.array(devices).reshape(1, -1),
        env_options_overrides=overrides,
        detailed_logging=False,
    )
    options.executable_build_options.use_spmd_partitioning = True
    options.executable_build_options.use_shardy_partitioner = True
    return options
