"""The expert layer of DeepSeek-V3 over 64 to 512 chips, on paper: memory, bytes, predicted time.

    python -m experiments.aot_scale --json=results/aot_scale.json

256 experts, 8 per token, model dim 7168, hidden dim 2048, bfloat16 (arXiv 2412.19437), forward pass
of one layer, experts over the mesh axes `data` (outer) and `expert` (inner), hidden dims over
`model` where there are more chips than experts. Memory and bytes are read from the program that the
TPU compiler made (rung: schedule). Times are predicted by `moejax.costmodel` from datasheets: one
collective at a time over all ports of a chip, products at half the peak, nothing overlapped.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import cli
from experiments.bench.moe_layer_arms import ragged_ffn
from experiments.routed import serve_routed
from moejax.aot.hlo import parse_hlo
from moejax.aot.targets import get_target, target_mesh
from moejax.collectives.inspect import inspect_collectives
from moejax.core.errors import check
from moejax.costmodel.hardware import get_chip
from moejax.costmodel.links import Link
from moejax.dispatch.api import make_dispatch
from moejax.dispatch.slots import Capacity
from moejax.experts.slotted import slotted
from moejax.experts.stage import resident_by
from moejax.kernels.grouped_ffn import GatedWeights

EXPERTS, TOP_K, MODEL_DIM, HIDDEN_DIM = 256, 8, 7168, 2048
TOKENS = flags.DEFINE_integer("chip_tokens", 512, "tokens of a chip", lower_bound=8)
SLICES = flags.DEFINE_list(
    "slices", ["v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8", "v5p:8x8x8"], "targets of 64 to 512 devices"
)
# data, expert, model of each number of devices.
SHAPES = {64: (8, 8, 1), 128: (8, 16, 1), 256: (16, 16, 1), 512: (16, 16, 2)}
AXES = ("data", "expert")
ROOM = Capacity(factor=1.25)
# Compiled natively for TPU: stands in for the kernel of a real run.
RAGGED = resident_by(ragged_ffn)
ALPHA_S = 1e-6  # assumed: start-up of a collective
HALF = 0.5  # assumed: share of the peak that products reach


def strategies(ranks: int) -> dict[str, dict[str, Any]]:
    """Arguments of `make_dispatch`."""
    return {
        "gather": {"name": "gather", "axis": AXES, "inner": RAGGED},
        "all_to_all": {
            "name": "all_to_all",
            "axis": AXES,
            "capacity": ROOM,
            "inner": slotted(ranks),
        },
        "flat de-duplicated": {
            "name": "hierarchical",
            "levels": (AXES,),
            "capacity": ROOM,
            "inner": RAGGED,
        },
        "hierarchical": {"name": "hierarchical", "levels": AXES, "capacity": ROOM, "inner": RAGGED},
    }


def layer(stage, x, topk_idx, topk_weights, experts):
    """y [T, D] and the count of drops; hidden dims are split over `model`."""
    y, dropped = serve_routed(stage, x, topk_idx, topk_weights, experts)
    return jax.lax.psum(y, "model").astype(x.dtype), dropped


def abstract_inputs(mesh: Mesh, tokens: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(x, topk_idx, topk_weights, experts), and their specs."""
    rows = tokens * mesh.shape["data"] * mesh.shape["expert"]
    column, row = P(AXES, None, "model"), P(AXES, "model")
    specs = (P(AXES),) * 3 + (
        GatedWeights(**dict[str, Any](w_gate=column, w_up=column, w_down=row)),
    )

    def struct(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    up = struct((EXPERTS, MODEL_DIM, HIDDEN_DIM), jnp.bfloat16, column)
    down = struct((EXPERTS, HIDDEN_DIM, MODEL_DIM), jnp.bfloat16, row)
    arguments = (
        struct((rows, MODEL_DIM), jnp.bfloat16, P(AXES)),
        struct((rows, TOP_K), jnp.int32, P(AXES)),
        struct((rows, TOP_K), jnp.float32, P(AXES)),
        GatedWeights(**dict[str, Any](w_gate=up, w_up=up, w_down=down)),
    )
    return arguments, specs


def compile_arm(mesh: Mesh, arguments: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Memory of a device and bytes on the wire per device and axis."""
    stage = make_dispatch(num_experts=EXPERTS, token_axes=AXES, **arguments)
    inputs, specs = abstract_inputs(mesh, tokens)
    body = jax.shard_map(partial(layer, stage), mesh=mesh, in_specs=specs, out_specs=(P(AXES), P()))
    compiled = jax.jit(body).lower(*inputs).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    traffic = inspect_collectives(parse_hlo(compiled.as_text() or ""), mesh).traffic
    moved = dict.fromkeys(mesh.axis_names, 0)
    for (_, axis), part in traffic.items():
        moved[axis] += part.nbytes // mesh.size
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "wire_bytes": moved,
        "messages": sum(part.messages for part in traffic.values()) // mesh.size,
        "collectives": len({kind for kind, _ in traffic}),
    }


def predict(found: dict[str, Any], generation: str, mesh: Mesh, tokens: int) -> dict[str, float]:
    """Seconds of the links and of the products, one after the other."""
    chip = get_chip(generation)
    link = Link(alpha_s=ALPHA_S, beta_s_per_byte=1 / chip.interconnect_bytes_per_s)
    seconds = {axis: link.seconds(n) for axis, n in found["wire_bytes"].items() if n}
    operations = 6.0 * tokens * TOP_K * MODEL_DIM * HIDDEN_DIM / mesh.shape["model"]
    return {
        "links_s": sum(seconds.values()),
        "products_s": operations / (HALF * chip.bf16_flops),
    }


def main() -> None:
    cli.check_writable(cli.JSON.value)
    for name in SLICES.value:
        devices = get_target(name).num_devices
        check(devices in SHAPES, f"--slices={name} has {devices} devices, want one of {[*SHAPES]}")
    figures: dict[str, Any] = {"tokens": TOKENS.value}
    axes = ("data", "expert", "model")
    table = Table("chips")
    table.add_column("strategy", no_wrap=True)
    headers = ("weights GiB", "temporary MiB", *(f"MiB over {a}" for a in axes))
    for header in (*headers, "links ms", "products ms"):
        table.add_column(header)
    jobs = [(name, arm) for name in SLICES.value for arm in strategies(1)]
    for name, arm in track(jobs, description="compiling", transient=True):
        target = get_target(name)
        data, expert, model = SHAPES[target.num_devices]
        mesh = target_mesh(name, data=data, expert=expert, model=model)
        ranks = mesh.shape["data"] * mesh.shape["expert"]
        found = compile_arm(mesh, strategies(ranks)[arm], TOKENS.value)
        found |= predict(found, target.generation, mesh, TOKENS.value)
        figures.setdefault(name, {})[arm] = found
        wire = (f"{found['wire_bytes'][axis] / 2**20:.1f}" for axis in axes)
        table.add_row(
            str(target.num_devices),
            arm,
            f"{found['argument_bytes'] / 2**30:.2f}",
            f"{found['temporary_bytes'] / 2**20:.0f}",
            *wire,
            f"{1e3 * found['links_s']:.2f}",
            f"{1e3 * found['products_s']:.2f}",
        )
    Console(width=None if Console().is_terminal else 120).print(table)
    cli.write_report("aot_scale", "schedule", figures, device="compiled for, not run")


if __name__ == "__main__":
    cli.run(main)
