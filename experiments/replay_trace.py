"""Replays recorded routing of a real model through cache policies under byte budgets.

    python -m experiments.replay_trace --trace=tests/data/traces/qwen.route.csv \\
        --budget_mib=500,1000,2000,4000,8000 --json=results/replay_qwen.json

Reads `route_trace v1` CSV and `RoutingTrace` npz. `docs/trace_replay.md` defines a call, a hit, a
byte and every policy. `hit_rate` is that of decode steps after the prompt warmed the cache.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from experiments import cli, plot_file
from experiments.replay_plot import plot
from experiments.traces import TRACE, open_trace
from moejax.core.errors import InputError, check
from moejax.data.route_csv import RecordedRouting
from moejax.data.routing_trace import RoutingTrace
from moejax.simulator.calls import Calls, calls_of_trace
from moejax.simulator.recorded import calls_that_differ, recorded_misses
from moejax.simulator.replay import RULES, replay
from moejax.simulator.summary import Summary, layer_hit_rate, summarize

POLICIES = flags.DEFINE_string("policies", ",".join(RULES), "comma-separated cache policies")
BUDGETS = flags.DEFINE_string("budget_mib", None, "comma-separated cache sizes, 1 MiB = 2^20 bytes")
PLOT = flags.DEFINE_string("plot", None, "PNG to write; beside --json when not given")

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One policy at one budget."""

    decode: Summary
    total: Summary
    lowest_layer: int
    lowest_layer_hit_rate: float
    differing_calls: int | None  # from the recorded run


def parse_policies(text: str) -> list[str]:
    """Splits `--policies`."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        known = ", ".join(RULES)
        check(name in RULES, f"--policies={text}: {name!r} is unknown; there are {known}")
        check(names.count(name) == 1, f"--policies={text}: {name!r} is given twice")
    return names


def parse_budgets(text: str | None) -> dict[str, int]:
    """Bytes of every budget of `--budget_mib`, keyed by its number of MiB."""
    check(bool(text), "--budget_mib is missing; give cache sizes such as --budget_mib=250,500,1000")
    budgets = {}
    for item in str(text).split(","):
        try:
            mib = float(item)
        except ValueError:
            mib = math.nan
        if not 0 < mib * MIB < 1 << 63:  # false for nan
            raise InputError(f"--budget_mib={text}: {item!r} is not a positive number of MiB")
        key = f"{mib:.12g}"
        check(key not in budgets, f"--budget_mib={text}: {key} is given twice")
        budgets[key] = int(mib * MIB)
    return dict(sorted(budgets.items(), key=lambda budget: budget[1]))


def check_budgets(budgets: dict[str, int], calls: Calls) -> None:
    """The smallest budget must hold what one token wants from one layer."""
    key, smallest = next(iter(budgets)), calls.top_k * int(calls.expert_bytes.max())
    check(
        budgets[key] >= smallest,
        f"--budget_mib: {key} MiB cannot hold the {calls.top_k} experts of one token in one layer;"
        f" the minimum is {smallest / MIB:.4g}",
    )


def replay_all(
    calls: Calls,
    policies: list[str],
    budgets: dict[str, int],
    misses: np.ndarray | None,
    console: Console,
) -> dict[str, dict[str, Run]]:
    """Runs every policy at every budget."""
    runs: dict[str, dict[str, Run]] = {policy: {} for policy in policies}
    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("replay", total=len(policies) * len(budgets))
        for policy in policies:
            for key, budget in budgets.items():
                progress.update(task, description=f"{policy} at {key} MiB")
                outcome = replay(calls, policy, budget)
                rates = layer_hit_rate(calls, outcome, decode_only=True)
                runs[policy][key] = Run(
                    decode=summarize(calls, outcome, decode_only=True),
                    total=summarize(calls, outcome),
                    lowest_layer=int(np.nanargmin(rates)),
                    lowest_layer_hit_rate=float(np.nanmin(rates)),
                    differing_calls=None if misses is None else calls_that_differ(misses, outcome),
                )
                progress.advance(task)
    return runs


def figures_of(trace: RoutingTrace, calls: Calls, runs: dict[str, dict[str, Run]]) -> dict:
    """Everything but the recorded run, for the JSON report."""
    decoded = int(np.sum(trace.sequence_lengths - trace.prompt_lengths))

    def each(value) -> dict[str, dict[str, Any]]:
        return {
            policy: {key: value(run) for key, run in row.items()} for policy, row in runs.items()
        }

    return {
        "model": trace.meta.get("model", "unknown model"),
        "layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "prompt_tokens": trace.num_tokens - decoded,
        "decoded_tokens": decoded,
        "calls": len(calls.layer),
        "all_experts_mib": mib(int(trace.expert_bytes.sum()) * trace.num_experts),
        "experts_of_one_token_mib": mib(calls.token_bytes),
        "hit_rate": each(lambda run: percent(run.decode.hit_rate)),
        "hit_rate_cumulative": each(lambda run: percent(run.total.hit_rate)),
        "decode_mib_per_token": each(lambda run: mib(run.decode.bytes_loaded / decoded)),
        "mib_loaded": each(lambda run: mib(run.total.bytes_loaded)),
        "evictions": each(lambda run: run.total.evictions),
        "lowest_layer": each(lambda run: run.lowest_layer),
        "lowest_layer_hit_rate": each(lambda run: percent(run.lowest_layer_hit_rate)),
        "decode_calls_over_budget": each(lambda run: run.decode.calls_over_budget),
        "peak_mib": each(lambda run: mib(run.total.peak_bytes)),
    }


def recorded_figures(
    recorded: RecordedRouting, calls: Calls, misses: np.ndarray, runs: dict[str, dict[str, Run]]
) -> dict[str, Any]:
    """The recorded run's own cache result, and the replay that comes closest to it."""
    lookups, decode = calls.lookups, calls.is_decode
    decode_lookups = int(lookups[decode].sum())
    policy, key = min(
        ((policy, key) for policy, row in runs.items() for key in row),
        key=lambda at: runs[at[0]][at[1]].differing_calls or 0,
    )
    return {
        "hit_rate": percent(1 - misses[decode].sum() / decode_lookups),
        "hit_rate_cumulative": percent(1 - misses.sum() / lookups.sum()),
        "mib_loaded": mib(int(recorded.bytes_read.sum())),
        "decode_lookups": decode_lookups,
        "decode_misses": int(misses[decode].sum()),
        "rows_with_residency_0": int((recorded.residency == 0).sum()),
        "rows_with_bytes": int((recorded.bytes_read > 0).sum()),
        "closest_replay": {
            "policy": policy,
            "budget_mib": key,
            "calls_that_differ": runs[policy][key].differing_calls,
        },
    }


def percent(fraction: float) -> float:
    return round(100 * float(fraction), 3)


def mib(size: float) -> float:
    return round(size / MIB, 3)


def print_tables(console: Console, figures: dict[str, Any]) -> None:
    """The hit rates, and what a reader must know to use them."""
    policies, everything = list(figures["hit_rate"]), figures["all_experts_mib"]
    title = f"{figures['model']}: decode hit rate in %"
    table = Table("MiB", "of all", *policies, title=title, title_justify="left")
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for key in figures["hit_rate"][policies[0]]:
        cells = []
        for policy in policies:
            over = "*" if figures["decode_calls_over_budget"][policy][key] else " "
            cells.append(f"{figures['hit_rate'][policy][key]:.1f}{over}")
        table.add_row(key, f"{100 * float(key) / everything:.0f} %", *cells)
    console.print(table)
    for note in notes(figures):
        console.print(note, highlight=False)


def notes(figures: dict[str, Any]) -> list[str]:
    """One line for each thing that qualifies the table."""
    cycle, lines = figures["experts_of_one_token_mib"], []
    over = figures["decode_calls_over_budget"].values()
    if any(count for row in over for count in row.values()):
        lines.append("* one decode call needs more than its layer's share, and overruns it.")
    overrun = [
        (peak, policy, key)
        for policy, row in figures["peak_mib"].items()
        for key, peak in row.items()
        if peak > float(key) + 0.001  # the report rounds
    ]
    if overrun:
        peak, policy, key = max(overrun)
        lines.append(
            f"Up to {peak:.0f} MiB are in use ({policy} at {key}): a prompt's experts stay until "
            "the next call on their layer, which favours the first decoded token."
        )
    budgets = [float(key) for key in next(iter(figures["hit_rate"].values()))]
    lines.append(f"One token uses {cycle:.0f} MiB of experts (sum over layers of top_k x bytes).")
    if min(budgets) < cycle and "lru" in figures["hit_rate"]:
        lines[-1] += " Below that, global LRU evicts experts before their layer comes round."
    if recorded := figures.get("recorded"):
        best = recorded["closest_replay"]
        lines.append(
            f"Recorded run: {recorded['hit_rate']:.1f} % decode, "
            f"{recorded['hit_rate_cumulative']:.1f} % with prefill, "
            f"{recorded['mib_loaded']:.0f} MiB read. Closest replay: {best['policy']} at "
            f"{best['budget_mib']} MiB; {best['calls_that_differ']} of {figures['calls']} calls "
            "load a different number of experts."
        )
    return lines


def main() -> None:
    policies, budgets = parse_policies(POLICIES.value), parse_budgets(BUDGETS.value)
    plot_path = plot_file.path_of("plot", PLOT.value)
    trace, recorded = open_trace(TRACE.value)
    calls = calls_of_trace(trace)
    check(bool(calls.is_decode.any()), f"{TRACE.value}: no decode step, so no decode hit rate")
    check_budgets(budgets, calls)
    misses = None if recorded is None else recorded_misses(recorded, calls)
    console = Console()
    runs = replay_all(calls, policies, budgets, misses, console)
    figures = figures_of(trace, calls, runs)
    if recorded is not None and misses is not None:
        figures["recorded"] = recorded_figures(recorded, calls, misses, runs)
    print_tables(console, figures)
    cli.write_report("replay_trace", "simulated", figures)
    if plot_path:
        plot(figures, plot_path)
    plot_file.print_written(console, plot_path)


if __name__ == "__main__":
    cli.run(main)
