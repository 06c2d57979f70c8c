"""Compile a program for an accelerator that is not here, and check its schedule.

    python -m experiments.aot_report --program=offloaded_decode --target=v5e:2x2 --json=OUT

The figures belong to the rung *schedule*: what the compiler decided about memory, transfers and
their order. They hold no time.
"""

from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.aot_programs import PROGRAMS, Built
from moejax.aot.compile import CompiledFacts, compile_for
from moejax.aot.gpu import facts_for_h100
from moejax.aot.targets import get_target, target_mesh
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.core.overlay import overlay

PROGRAM = flags.DEFINE_string(
    "program", "offloaded_decode", f"what to compile: {', '.join(PROGRAMS)}"
)
TARGET = flags.DEFINE_string(
    "target", "v5e:2x2", "TPU generation and topology, e.g. v6e:2x2, or H100"
)
SET = cli.define_set()


def main() -> None:
    cli.check_writable(cli.JSON.value)
    check(
        PROGRAM.value in PROGRAMS,
        f"--program={PROGRAM.value} is not one of {', '.join(PROGRAMS)}",
    )
    program = overlay(PROGRAMS[PROGRAM.value](), SET.value)
    built, facts, kind = compiled(program, TARGET.value)
    figures = collect(built, facts)
    record = cli.write_report(
        f"aot_report/{PROGRAM.value}",
        "schedule",
        {"program": PROGRAM.value, "target": TARGET.value, "config": str(program), **figures},
        device=f"{kind} (compiled for, not run)",
    )
    show(record)


def compiled(program: Any, target: str) -> tuple[Built, CompiledFacts, str]:
    """The program built and compiled for `target`, and the name of its devices."""
    if target == "H100":
        cli.use_cpu_devices(program.expert_axis)  # they stand for the GPUs
        built = program.build(make_mesh(expert=program.expert_axis))
        return built, facts_for_h100(built.fn, built.abstract_args), "NVIDIA H100 80GB HBM3"
    mesh = target_mesh(get_target(target).name, expert=program.expert_axis)
    built = program.build(mesh)
    kind = mesh.devices.flat[0].device_kind
    return built, compile_for(built.fn, built.abstract_args), kind


def collect(built: Built, facts: CompiledFacts) -> dict[str, Any]:
    """The figures of one compiled program; bytes are per device."""
    prefetch = facts.fetches(built.prefetch_scope)
    overlapped = facts.overlapped(built.prefetch_scope, built.compute_scope)
    figures = {
        "host_temp_bytes": facts.memory.host_temporaries,
        "prefetch_transfers": len(prefetch),
        "prefetch_overlapped": len(overlapped),
        "prefetch_bytes": sum(one.nbytes for one in prefetch),
        "step_prefetch_bytes": built.layers * sum(one.nbytes for one in prefetch),
        "step_demand_bytes_at_most": built.wanted_bytes,
        "whole_cache_copies": _copies(facts, built.cache_shapes),
        "whole_host_copies": _copies(facts, built.host_shapes),
        "device_bytes": facts.memory.device_bytes,
        "device_temp_bytes": facts.memory.device_temporaries,
        "host_bytes": facts.memory.host_bytes,
        "host_callbacks": facts.host_callbacks,
        "host_computes": len(facts.host_computes),
        "host_computes_overlapped": len(facts.overlapped_host_computes(built.compute_scope)),
        "collectives": [
            {"kind": one.kind, "axes": list(one.axes), "bytes": one.nbytes}
            for one in facts.collectives
        ],
    }
    if built.demand_scope:
        figures["demand_transfers"] = len(facts.fetches(built.demand_scope))
        figures["demand_overlapped"] = len(facts.overlapped(built.demand_scope, "grouped_ffn"))
    if built.device_budget:
        figures["device_budget_bytes"] = built.device_budget
    figures["holds"] = holds(figures)
    return figures


def holds(figures: dict[str, Any]) -> bool:
    """Whether the program streams: every prefetch hidden, nothing copied whole, in the budget."""
    unwanted = ("host_temp_bytes", "whole_cache_copies", "whole_host_copies", "host_callbacks")
    hidden = figures["prefetch_overlapped"] == figures["prefetch_transfers"]
    fits = figures["device_bytes"] <= figures.get("device_budget_bytes", figures["device_bytes"])
    return hidden and fits and not any(figures[name] for name in unwanted)


def _copies(facts: CompiledFacts, shapes: tuple[tuple[int, ...], ...]) -> int:
    return len({one.name for shape in shapes for one in facts.whole_copies(shape)})


def show(record: dict[str, Any]) -> None:
    """Prints the figures as a table."""
    figures = record["figures"]
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        if name in ("program", "target", "config"):
            continue
        if name == "collectives":
            value = f"{len(value)}, {sum(one['bytes'] for one in value):,} bytes"
        if isinstance(value, bool):
            value = "yes" if value else "no"
        table.add_row(name, value if isinstance(value, str) else f"{value:,}")
    console = Console()
    console.print(f"{figures['program']} for {figures['target']}: {record['device']}")
    console.print(table)
    console.print("rung: schedule. Compiled, not run: no figure here is a time.")


if __name__ == "__main__":
    cli.run(main)
