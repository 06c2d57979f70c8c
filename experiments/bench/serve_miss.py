"""Three ways to serve a miss: move the expert, let the host compute it, or half of each.

    python -m experiments.bench.serve_miss --json=results/serve_miss.json

One program runs all layers of a model in which every wanted expert is missing; `resident` computes
the same from device memory. What a miss costs beyond it is the price of that way. On CPU the host
is the device and the link is a copy in its memory, so the ways cost what their bytes cost, and
nothing overlaps. The fitted costs are what `serve="divide"` divides by.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.bench.timing import ROUNDS
from experiments.offload_steps.miss_costs import (
    WAYS,
    Misses,
    fit_costs,
    random_experts,
    time_ways,
)
from moejax.core.errors import check
from moejax.offload.store import check_platform, expert_bytes

ROWS = flags.DEFINE_list("rows", ["1", "4", "16", "64"], "tokens that want a missing expert")
D_MODEL = flags.DEFINE_integer("d_model", 512, "model dim", lower_bound=1)
D_FF = flags.DEFINE_integer("d_ff", 256, "hidden dim of an expert", lower_bound=2)
LAYERS = flags.DEFINE_integer("layers", 8, "MoE layers", lower_bound=1)
EXPERTS = flags.DEFINE_integer("experts", 64, "experts of a layer", lower_bound=1)
TOP_K = flags.DEFINE_integer("top_k", 8, "misses of a layer", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the weights")


def main() -> None:
    cli.check_writable(cli.JSON.value)
    check(
        2 * TOP_K.value <= EXPERTS.value,
        f"--top_k={TOP_K.value} of --experts={EXPERTS.value}: two passes would want the same ones",
    )
    counts = cli.read_counts(ROWS)
    experts = random_experts(
        LAYERS.value, EXPERTS.value, D_MODEL.value, D_FF.value, jnp.dtype(DTYPE.value)
    )
    check_platform(experts, jax.devices()[0].platform)
    by_rows = {
        rows: time_ways(Misses(experts=experts, top_k=TOP_K.value, rows=rows), rounds=ROUNDS.value)
        for rows in sorted(set(counts))
    }
    figures: dict[str, Any] = {
        "expert_bytes": expert_bytes(experts),
        "ms_per_miss": {
            str(rows): {way: 1e3 * seconds for way, seconds in ways.items()}
            for rows, ways in by_rows.items()
        },
        "gb_per_s": {
            str(rows): {way: expert_bytes(experts) / seconds / 1e9 for way, seconds in ways.items()}
            for rows, ways in by_rows.items()
        },
        "costs": dataclasses.asdict(fit_costs(by_rows)),
    }
    show(figures)
    cli.write_report("bench/serve_miss", "time", figures)


def show(figures: dict[str, Any]) -> None:
    table = Table("rows", *(f"{way} ms (GB/s)" for way in WAYS))
    for rows, ways in figures["ms_per_miss"].items():
        rates = figures["gb_per_s"][rows]
        table.add_row(rows, *(f"{ways[way]:.3f} ({rates[way]:.1f})" for way in WAYS))
    console = Console()
    console.print(table)
    costs = ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in figures["costs"].items())
    console.print(f"one expert of {figures['expert_bytes']:,} bytes: {costs}")


if __name__ == "__main__":
    cli.run(main)
