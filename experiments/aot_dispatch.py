"""What compilers make of pipelined dispatch: collectives of one chunk behind experts of another.

    python -m experiments.aot_dispatch --json=results/aot_dispatch.json
    python -m experiments.aot_dispatch --targets=h100:8    # wants `source scripts/gpu_compiler.sh`

Compiles the forward and backward pass of one expert layer over 8 devices for targets that are not
here, and counts the collectives that have matrix products between their start and their end. The
rung is *schedule*: order and bytes, never a time.
"""

import dataclasses
from collections.abc import Callable
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
from moejax.aot.compile import compile_for
from moejax.aot.gpu import compile_for_h100
from moejax.aot.targets import get_target, target_mesh
from moejax.collectives.inspect import Inspection, inspect_collectives
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.dispatch.api import make_dispatch
from moejax.dispatch.overlap import overlap_options
from moejax.experts.slotted import slotted
from moejax.experts.stage import resident_by
from moejax.kernels.grouped_ffn import GatedWeights

TARGETS = flags.DEFINE_list(
    "targets", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "7x:2x2x1"], "8 devices each"
)
CHOSEN = flags.DEFINE_list("arms", None, "some arms by the strategy's name; default: all")
CHUNKS = flags.DEFINE_list("chunks", ["1", "2"], "numbers of chunks")
H100 = "h100:8"
RANKS, TOKENS, EXPERTS, TOP_K, MODEL_DIM, HIDDEN_DIM = 8, 512, 64, 8, 2048, 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A strategy, its arguments, and whether the compiler gets `overlap_options`."""

    strategy: str
    arguments: dict[str, Any]
    with_options: bool = False


ALL_TO_ALL = {"inner": slotted(RANKS)}
# Compiled natively everywhere: stands in for the kernel of a real run.
RAGGED = {"inner": resident_by(ragged_ffn)}
ARMS = {
    "all_to_all": Arm(strategy="all_to_all", arguments=ALL_TO_ALL),
    "all_to_all, options": Arm(strategy="all_to_all", arguments=ALL_TO_ALL, with_options=True),
    "all_to_all, shifted": Arm(
        strategy="all_to_all", arguments=ALL_TO_ALL | {"lowering": "shifted"}
    ),
    "gather": Arm(strategy="gather", arguments=RAGGED),
    "gather, options": Arm(strategy="gather", arguments=RAGGED, with_options=True),
    "ragged, options": Arm(strategy="ragged", arguments=RAGGED, with_options=True),
    # One level, all that a mesh of one axis has.
    "hierarchical, options": Arm(strategy="hierarchical", arguments=RAGGED, with_options=True),
    "grouped, options": Arm(
        strategy="grouped",
        arguments=RAGGED | {"num_groups": RANKS, "gate": "balanced_groups"},
        with_options=True,
    ),
}


def layer(stage: Callable[..., Any], x, topk_idx, topk_weights, experts):
    """float32 [], something to differentiate."""
    y, _ = serve_routed(stage, x, topk_idx, topk_weights, experts)
    return jax.lax.psum(jnp.sum(jnp.square(y)), "expert")


def compile_arm(target: str, arm: Arm, num_chunks: int) -> Inspection:
    """Value and gradients of the layer, compiled for the target."""
    stage = make_dispatch(arm.strategy, num_experts=EXPERTS, num_chunks=num_chunks, **arm.arguments)
    mesh = mesh_of(target)
    specs = (P("expert"),) * 4
    body = jax.shard_map(partial(layer, stage), mesh=mesh, in_specs=specs, out_specs=P())
    step = jax.value_and_grad(body, argnums=(0, 2, 3))
    options = overlap_options(platform_of(target)) if arm.with_options else None
    if target == H100:
        module = compile_for_h100(step, abstract_inputs(mesh), compiler_options=options)
    else:
        module = compile_for(step, abstract_inputs(mesh), compiler_options=options).module
    return inspect_collectives(module, mesh)


def platform_of(target: str) -> str:
    return "gpu" if target == H100 else "tpu"


def mesh_of(target: str) -> Mesh:
    """Eight devices of the target; CPU devices stand for GPUs."""
    return make_mesh(expert=RANKS) if target == H100 else target_mesh(target, expert=RANKS)


def jobs_of(targets: list[str], chunks: list[int]) -> list[tuple[str, str, int]]:
    """(target, arm, chunks) of everything to compile."""
    return [
        (target, name, r)
        for target in targets
        for name, arm in ARMS.items()
        for r in chunks
        if not arm.with_options or overlap_options(platform_of(target))
        if CHOSEN.value is None or arm.strategy in CHOSEN.value
    ]


def abstract_inputs(mesh: Mesh) -> tuple[Any, ...]:
    """Shapes of (x, topk_idx, topk_weights, experts), sharded over `expert`."""

    def struct(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("expert")))

    column = struct((EXPERTS, MODEL_DIM, HIDDEN_DIM))
    row = struct((EXPERTS, HIDDEN_DIM, MODEL_DIM))
    experts = GatedWeights(**dict[str, Any](w_gate=column, w_up=column, w_down=row))
    tokens = TOKENS * RANKS
    return (
        struct((tokens, MODEL_DIM)),
        struct((tokens, TOP_K), jnp.int32),
        struct((tokens, TOP_K), jnp.float32),
        experts,
    )


def facts(found: Inspection) -> dict[str, int]:
    """Counts of collectives of rows; those of a few numbers each do not matter."""
    large = [one for one in found.flights if one.collective.nbytes >= 2**20]
    return {
        "collectives": len(large),
        "overlapped": sum(one.flops > 0 for one in large),
        "in_flight": max((one.in_flight for one in large), default=0),
        "wire_bytes": sum(part.nbytes for part in found.traffic.values()),
    }


def check_targets(targets: list[str]) -> None:
    for name in targets:
        devices = RANKS if name == H100 else get_target(name).num_devices
        check(devices == RANKS, f"--targets={name} has {devices} devices, want {RANKS}")


def main() -> None:
    cli.check_writable(cli.JSON.value)
    chunks = [int(one) for one in CHUNKS.value if one.strip().isdigit() and int(one) > 0]
    check(len(chunks) == len(CHUNKS.value), f"--chunks={CHUNKS.value} are not positive numbers")
    check_targets(TARGETS.value)
    strategies = sorted({arm.strategy for arm in ARMS.values()})
    for name in CHOSEN.value or ():
        check(name in strategies, f"--arms={name} is not one of {', '.join(strategies)}")
    if H100 in TARGETS.value:
        cli.use_cpu_devices(RANKS)
    details: dict[str, Any] = {}
    overlapped: dict[str, dict[str, int]] = {}
    table = Table("target", "arm", "chunks", "collectives", "behind products", "in flight")
    jobs = jobs_of(TARGETS.value, chunks)
    for target, name, r in track(jobs, description="compiling", transient=True):
        found = facts(compile_arm(target, ARMS[name], r))
        details.setdefault(target, {}).setdefault(name, {})[str(r)] = found
        overlapped.setdefault(target, {})[f"{name}, {r} chunks"] = found["overlapped"]
        counts = (found["collectives"], found["overlapped"], found["in_flight"])
        table.add_row(target, name, str(r), *map(str, counts))
    Console(width=None if Console().is_terminal else 110).print(table)
    figures = {"overlapped_ops": overlapped, "details": details}
    cli.write_report("aot_dispatch", "schedule", figures, device="compiled for, not run")


if __name__ == "__main__":
    cli.run(main)
