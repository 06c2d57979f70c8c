"""Bytes of every schedule as its proof counts them, beside those of compilers that are not here.

    python -m experiments.aot_collectives --json=results/aot_collectives.json
    python -m experiments.aot_collectives --targets=h100:8   # after scripts/gpu_compiler.sh

Compiles each builder's schedule for 2 x 4 devices and reads its permutes back from the program; and
an all-reduce over two slices, plain and with int8 codes over the slow axis, of which it reads what
leaves a slice; for H100s also the multicast kernels. The rung is *schedule*: bytes, never a time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import cli
from moejax.aot.compile import compile_for
from moejax.aot.gpu import compile_for_h100
from moejax.aot.hlo import Module, parse_hlo
from moejax.aot.targets import get_target, target_devices, target_mesh
from moejax.collectives.builders import BUILDERS, hierarchical_all_reduce
from moejax.collectives.codecs import BlockQuant
from moejax.collectives.compose import with_codec
from moejax.collectives.flat import all_reduce
from moejax.collectives.inspect import cross_slice_bytes, inspect_collectives
from moejax.collectives.lower import run_schedule
from moejax.collectives.multicast import multicast_all_gather, multicast_reduce_scatter
from moejax.collectives.schedule import Schedule
from moejax.collectives.traffic import traffic
from moejax.core.errors import check
from moejax.core.mesh import make_mesh

TARGETS = flags.DEFINE_list("targets", ["v5e:2x4", "v6e:2x4", "v5p:2x2x2"], "8 devices each")
SLICES = flags.DEFINE_list("slices", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"], "4 devices, taken twice")
H100, AXES, WIDTH, ELEMENTS = "h100:8", {"data": 2, "expert": 4}, 256, 2**20


def bytes_by_axis(schedule: Schedule, target: str) -> tuple[dict[str, int], dict[str, int]]:
    """Of all devices together: as the schedule says, and as the compiled program does."""
    mesh = make_mesh(**AXES) if target == H100 else target_mesh(target, **AXES)
    spec = P(tuple(AXES))
    rows = len(schedule.start[0]) * schedule.num_ranks
    integers = any(one.combine == "xor" for step in schedule.steps for one in step.transfers)
    dtype = jnp.uint32 if integers else jnp.float32
    x = jax.ShapeDtypeStruct((rows, WIDTH), dtype, sharding=NamedSharding(mesh, spec))
    run = jax.shard_map(
        lambda x: run_schedule(schedule, x)[0], mesh=mesh, in_specs=spec, out_specs=spec
    )
    compiled = compile_for_h100(run, [x]) if target == H100 else compile_for(run, [x]).module
    found: dict[str, int] = {}
    for (_, axis), moved in inspect_collectives(compiled, mesh).traffic.items():
        found[axis] = found.get(axis, 0) + moved.nbytes
    return {axis: one.nbytes for axis, one in traffic(schedule, 4 * WIDTH).items()}, found


def slice_mesh(name: str) -> Mesh:
    """Two slices of a target, `data` from one to the other."""
    devices_of_one = target_devices(name)  # libtpu is loaded, and told that it has no machine
    check(len(devices_of_one) == 4, f"--slices={name} has {len(devices_of_one)} devices, want 4")
    topology = topologies.get_topology_desc(get_target(name).topology, platform="tpu", num_slices=2)
    devices = sorted(topology.devices, key=lambda device: (device.slice_index, device.id))
    return make_mesh(**AXES, devices=devices)


def compile_sum(mesh: Mesh, schedule: Schedule | None) -> Module:
    """An all-reduce of 4 MiB per device, by `psum` where no schedule is given."""
    axes, spec = tuple(AXES), P(tuple(AXES))

    def run(x):
        if schedule is not None:
            return all_reduce(schedule, x)
        return lax.pcast(lax.psum(x, axes), axes, to="varying")

    x = jax.ShapeDtypeStruct((8 * ELEMENTS,), jnp.float32, sharding=NamedSharding(mesh, spec))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    return parse_hlo(jax.jit(mapped).lower(x).compile().as_text() or "")


def int8_sum() -> dict[str, Any]:
    """Relative error of the int8 sum of N(0, 1) on CPU devices, and whether ranks agree."""
    schedule = with_codec(hierarchical_all_reduce(AXES), BlockQuant(), "data")
    mesh, spec = make_mesh(**AXES), P(tuple(AXES))
    x = np.random.default_rng(0).standard_normal((8, 2**16)).astype(np.float32)
    run = jax.shard_map(
        lambda x: all_reduce(schedule, x[0])[None], mesh=mesh, in_specs=spec, out_specs=spec
    )
    got = np.asarray(jax.jit(run)(jax.device_put(x, NamedSharding(mesh, spec))))
    want = x.astype(np.float64).sum(0)
    error = np.linalg.norm(got[0] - want) / np.linalg.norm(want)
    return {"relative_error": float(error), "ranks_identical": bool((got == got[0]).all())}


def multicast_kernels() -> dict[str, dict[str, int]]:
    """Kernels, and collectives of the compiler, in a gather and a scatter of rows between H100s."""
    mesh, spec, found = make_mesh(expert=8), P("expert"), {}
    run = jax.shard_map(
        lambda x: multicast_reduce_scatter(multicast_all_gather(x, ("expert",)), ("expert",)),
        mesh=mesh, in_specs=spec, out_specs=spec,
    )  # fmt: skip
    for dtype in (jnp.bfloat16, jnp.float32):
        shape, sharding = (8 * 512, 2048), NamedSharding(mesh, spec)
        module = compile_for_h100(run, [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)])
        targets = [one.target for _, _, one in module.instructions()]
        found[jnp.dtype(dtype).name] = {
            "kernels": targets.count("mosaic_gpu_v2"),
            "collectives": len(inspect_collectives(module, mesh).flights),
        }
    return found


def main() -> None:
    cli.check_writable(cli.JSON.value)
    for name in TARGETS.value:
        devices = 8 if name == H100 else get_target(name).num_devices
        check(devices == 8, f"--targets={name} has {devices} devices, want 8")
    check(len(TARGETS.value + SLICES.value) > 0, "--targets= and --slices= name nothing to compile")
    cli.use_cpu_devices(8)
    checked: dict[str, Any] = {}
    in_hlo: dict[str, Any] = {}
    jobs = [(target, name) for target in TARGETS.value for name in BUILDERS]
    for target, name in track(jobs, description="compiling", transient=True):
        want, found = bytes_by_axis(BUILDERS[name].build(AXES), target)
        checked.setdefault(target, {})[name], in_hlo.setdefault(target, {})[name] = want, found
    equal = {target: in_hlo[target] == checked[target] for target in TARGETS.value}
    schedule = with_codec(hierarchical_all_reduce(AXES), BlockQuant(), "data")
    slices = SLICES.value if H100 not in TARGETS.value else []
    sent = {}
    for name in track(slices, description="compiling two slices", transient=True):
        mesh = slice_mesh(name)
        arms = {"psum": None, "int8": schedule}
        sent[name] = {arm: cross_slice_bytes(compile_sum(mesh, one)) for arm, one in arms.items()}
    reduction = {name: one["psum"] / one["int8"] for name, one in sent.items()}
    table = Table("target", "schedules", "bytes as proven")
    for target in TARGETS.value:
        same = sum(in_hlo[target][name] == checked[target][name] for name in BUILDERS)
        table.add_row(target, str(len(BUILDERS)), f"{same} of {len(BUILDERS)}")
    for name, times in reduction.items():
        table.add_row(f"2 x {name}", "int8 beside psum", f"{times:.2f}x fewer leave a slice")
    Console().print(table)
    figures = {
        "bytes_checked": checked,
        "bytes_in_hlo": in_hlo,
        "bytes_equal": equal,
        "cross_slice_bytes_per_device": sent,
        "cross_slice_reduction": reduction,
        **int8_sum(),
    }
    if H100 in TARGETS.value:
        figures["multicast"] = multicast_kernels()
    cli.write_report("aot_collectives", "schedule", figures, device="compiled for, not run")


if __name__ == "__main__":
    cli.run(main)
