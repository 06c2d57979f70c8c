"""What compilers make of pipelined dispatch: collectives of one chunk behind experts of another.

    python -m experiments.aot_dispatch --targets=v5e:2x4,v6e:2x4 --json=OUT

Compiles the forward and backward pass of one expert layer over 8 devices for targets that are not
here, and counts the collectives that have matrix products between their start and their end. The
rung is *schedule*: order and bytes, never a time.
"""

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
from moejax.aot.hlo import parse_hlo
from moejax.aot.targets import get_target, target_mesh
from moejax.collectives.inspect import Inspection, inspect_collectives
from moejax.core.errors import check
from moejax.core.structs import Routing
from moejax.dispatch.api import make_dispatch
from moejax.dispatch.ranks import combined
from moejax.experts.slotted import slotted
from moejax.kernels.grouped_ffn import GatedWeights

TARGETS = flags.DEFINE_list(
    "targets", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "7x:2x2x1"], "8 devices each"
)
CHUNKS = flags.DEFINE_list("chunks", ["1", "2"], "numbers of chunks")
RANKS, TOKENS, EXPERTS, TOP_K, MODEL_DIM, HIDDEN_DIM = 8, 512, 64, 8, 2048, 1024
ASYNC: dict[str, str | bool] = {"xla_tpu_enable_async_all_to_all": "true"}
# Strategy, and compiler options beyond the default.
ARMS: dict[str, tuple[dict[str, Any], dict[str, str | bool]]] = {
    "all_to_all, native": ({"lowering": "native"}, {}),
    "all_to_all, native, async flag": ({"lowering": "native"}, ASYNC),
    "all_to_all, shifted": ({"lowering": "shifted"}, {}),
}


def layer(stage: Callable[..., Any], x, topk_idx, topk_weights, experts):
    """float32 [], something to differentiate."""
    logits = jnp.zeros_like(topk_weights)
    routing = Routing(topk_idx=topk_idx, topk_weights=topk_weights, router_logits=logits)
    outputs, _, _ = stage(x, routing, experts, jnp.int32(0), None)
    y = combined(outputs, topk_weights)
    return jax.lax.psum(jnp.sum(jnp.square(y)), "expert")


def compile_arm(
    mesh: Mesh, arguments: dict[str, Any], options: dict[str, str | bool], num_chunks: int
) -> Inspection:
    """Value and gradients of the layer, compiled for the mesh's devices."""
    stage = make_dispatch(
        "all_to_all",
        num_experts=EXPERTS,
        inner=slotted(RANKS),
        num_chunks=num_chunks,
        **arguments,
    )
    specs = (P("expert"),) * 4
    body = jax.shard_map(partial(layer, stage), mesh=mesh, in_specs=specs, out_specs=P())
    step = jax.value_and_grad(body, argnums=(0, 2, 3))
    lowered = jax.jit(step).lower(*abstract_inputs(mesh))
    compiled = lowered.compile(compiler_options=options or None)
    return inspect_collectives(parse_hlo(compiled.as_text() or ""), mesh)


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


def main() -> None:
    cli.check_writable(cli.JSON.value)
    chunks = [int(one) for one in CHUNKS.value if one.strip().isdigit() and int(one) > 0]
    check(len(chunks) == len(CHUNKS.value), f"--chunks={CHUNKS.value} are not positive numbers")
    for name in TARGETS.value:
        devices = get_target(name).num_devices
        check(devices == RANKS, f"--targets={name} has {devices} devices, want {RANKS}")
    jobs = [(name, arm, r) for name in TARGETS.value for arm in ARMS for r in chunks]
    figures: dict[str, Any] = {}
    table = Table("target", "arm", "chunks", "collectives", "behind products", "in flight")
    for name, arm, r in track(jobs, description="compiling", transient=True):
        arguments, options = ARMS[arm]
        found = facts(compile_arm(target_mesh(name, expert=RANKS), arguments, options, r))
        figures.setdefault(name, {}).setdefault(arm, {})[str(r)] = found
        counts = (found["collectives"], found["overlapped"], found["in_flight"])
        table.add_row(name, arm, str(r), *map(str, counts))
    Console(width=None if Console().is_terminal else 110).print(table)
    overlapped = {
        name: {
            f"{arm}, {r} chunks": one["overlapped"]
            for arm, rs in arms.items()
            for r, one in rs.items()
        }
        for name, arms in figures.items()
    }
    cli.write_report(
        "aot_dispatch",
        "schedule",
        {"overlapped_ops": overlapped, "details": figures},
        device="compiled for, not run",
    )


if __name__ == "__main__":
    cli.run(main)
