"""Simulated seconds of offloaded decode steps: a planner against fixed policies, on any machine.

    python -m experiments.simulate_offload --json=results/simulate_offload.json

Everything here is *simulated*: recorded routing, rates of `moejax.costmodel.hardware`, the policies
and the cost model of the library (`docs/offloading.md`). Per case (trace, batch size, hardware row)
the planner picks the plan of the least simulated time on a first part of the steps and is scored,
beside the fixed policies, on the rest. `regret_vs_best_fixed` is the largest chosen time over that
of the best fixed policy, minus 1; `gain_over` the best case against each.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from experiments import cli, plot_file
from experiments.flag_values import parse_fraction, parse_numbers
from experiments.simulate_plot import plot
from experiments.traces import MODELS, Model, open_trace
from moejax.core.errors import InputError, check
from moejax.costmodel.hardware import MACHINES, get_machine
from moejax.data.routing_trace import RoutingTrace
from moejax.simulator.plan_search import Case, run_case, split_steps
from moejax.simulator.plans import FIXED, ablation_plans, slots_of_fraction
from moejax.simulator.step_times import StepTimes, simulate
from moejax.simulator.workload import Workload, lanes_of_trace

TRACES = flags.DEFINE_list("traces", ["qwen", "gemma", "gptoss"], "names or paths, see traces.py")
HARDWARE = flags.DEFINE_list("hardware", list(MACHINES), "rows of moejax.costmodel.hardware")
BATCHES = flags.DEFINE_list("batches", ["1", "4", "16", "64"], "tokens of a step")
EXPERTS = flags.DEFINE_string("experts_on_device", "25%", "share of all experts that slots hold")
RECALL = flags.DEFINE_float("recall", 0.79, "of predictions one layer ahead", 0.0, 1.0)
ABLATION = flags.DEFINE_string("ablation_hardware", None, "a row of --hardware; default its first")
STEPS = flags.DEFINE_integer("max_steps", 64, "steps per case, both parts", lower_bound=4)
DENSE = flags.DEFINE_float("dense_bytes", None, "of a layer, for a trace given by path")
BITS = flags.DEFINE_float("bits_per_weight", None, "of its experts, for a trace given by path")
SEED = flags.DEFINE_integer("miss_seed", 0, "of the predictor's mistakes")
TIMES = flags.DEFINE_string("times_plot", None, "PNG to write; beside --json when not given")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """One trace at one batch size."""

    label: str
    train: Workload
    test: Workload
    slots: int
    is_cut: bool


def facts_of(name: str) -> Model:
    """Dense bytes and bits of a trace's model."""
    if name in MODELS:
        return MODELS[name]
    dense, bits = DENSE.value, BITS.value
    if dense is None or bits is None or min(dense, bits) <= 0:
        raise InputError(
            f"--traces={name}: a path also wants --dense_bytes and --bits_per_weight, above 0"
        )
    return Model(file=name, shipped=False, dense_bytes=dense, bits_per_weight=bits)


def make_input(name: str, trace: RoutingTrace, batch: int, fraction: float) -> Input:
    """Both parts of a trace's steps."""
    model = facts_of(name)
    lanes = lanes_of_trace(trace, batch, max_steps=STEPS.value)
    train, test = split_steps(
        lanes,
        dense_bytes=model.dense_bytes,
        bits_per_weight=model.bits_per_weight,
        recall=RECALL.value,
        seed=SEED.value,
    )
    return Input(
        label=f"{pathlib.Path(name).stem} B={batch}",
        train=train,
        test=test,
        slots=slots_of_fraction(fraction, trace.num_layers, trace.num_experts),
        is_cut=lanes.is_cut,
    )


def case_figures(given: Input, case: Case) -> dict[str, Any]:
    """One case of the report; milliseconds per step."""
    times = case.times
    best = min(case.fixed, key=lambda name: float(case.fixed[name].seconds.mean()))
    fixed = {name: _ms(times.seconds) for name, times in case.fixed.items()}
    return {
        "chosen": case.chosen.name,
        "chosen_ms": _ms(times.seconds),
        "fixed_ms": fixed,
        "best_fixed": best,
        "regret": round(1 / case.over_fixed(best) - 1, 4),
        "integral_bound_ms": _ms(times.integral_bound_s),
        "fractional_bound_ms": _ms(times.fractional_bound_s),
        "over_integral": round(float(times.seconds.sum() / times.integral_bound_s.sum()), 4),
        "over_fractional": round(float(times.seconds.sum() / times.fractional_bound_s.sum()), 4),
        "tokens_per_s": round(given.test.batch / case.seconds, 2),
        "hit_rate": round(1 - float(times.misses.sum() / times.lookups.sum()), 4),
        "misses_on_host": round(float(times.on_host.sum() / max(1, times.misses.sum())), 4),
        "link_busy": round(float(times.link_s.sum() / times.seconds.sum()), 4),
        "host_busy": round(float(times.host_s.sum() / times.seconds.sum()), 4),
        "steps_scored": len(times.seconds),
        "steps_to_choose": len(given.train.tokens),
        "trace_is_cut": given.is_cut,
    }


def summary_figures(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What holds over all cases."""
    gains, where = {}, {}
    for name in FIXED:
        over = {label: c["fixed_ms"][name] / c["chosen_ms"] - 1 for label, c in cases.items()}
        where[name] = max(over, key=lambda label: over[label])
        gains[name] = round(over[where[name]], 4)
    worst = max(cases, key=lambda label: cases[label]["regret"])
    return {
        "regret_vs_best_fixed": cases[worst]["regret"],
        "regret_case": worst,
        "gain_over": gains,
        "gain_case": where,
        "over_integral": _range(case["over_integral"] for case in cases.values()),
        "over_fractional": _range(case["over_fractional"] for case in cases.values()),
    }


def ablation_figures(given: Input, machine_name: str) -> dict[str, float]:
    """Milliseconds per step of each plan of the ablation, all scored alike."""

    def run(plan) -> StepTimes:
        return simulate(given.test, get_machine(machine_name), plan, slots=given.slots)

    return {plan.name: _ms(run(plan).seconds) for plan in ablation_plans()}


def print_tables(console: Console, figures: dict[str, Any]) -> None:
    """Simulated milliseconds of every case, then the summary."""
    title = "simulated ms per step"
    columns = ("chosen", "ms", "x bound", "best fixed", "ms", "its ms / ours")
    table = Table("case", *columns, title=title, title_justify="left")
    for label, case in figures["cases"].items():
        best, chosen_ms = case["best_fixed"], case["chosen_ms"]
        best_ms = case["fixed_ms"][best]
        table.add_row(
            label,
            case["chosen"],
            f"{chosen_ms:.4g}",
            f"{case['over_fractional']:.2f}",
            best,
            f"{best_ms:.4g}",
            f"{best_ms / chosen_ms:.3f}",
        )
    console.print(table)
    table = Table("simulated, over", "best gain", "in case", title_justify="left")
    for name, gain in figures["gain_over"].items():
        table.add_row(name, f"{100 * gain:.1f} %", figures["gain_case"][name])
    console.print(table)
    console.print(
        f"simulated: at worst {100 * figures['regret_vs_best_fixed']:.2f} % slower than the best "
        f"fixed policy ({figures['regret_case']}); {figures['over_fractional'][0]:.2f} to "
        f"{figures['over_fractional'][1]:.2f} times the fractional bound, "
        f"{figures['over_integral'][0]:.2f} to {figures['over_integral'][1]:.2f} the integral one"
    )
    if cut := sorted({label.rsplit(" ", 1)[0] for label, c in figures["cases"].items()
                      if c["trace_is_cut"]}):  # fmt: skip
        console.print(f"simulated from one text cut into pieces: {', '.join(cut)}")


def _ms(seconds: np.ndarray) -> float:
    return float(f"{1e3 * float(seconds.mean()):.6g}")


def _range(values) -> list[float]:
    values = list(values)
    return [min(values), max(values)]


def run_cases(console: Console, inputs: list[Input]) -> dict[str, Any]:
    """All cases and ablations, with a progress bar."""
    cases, ablation, ablated = {}, {}, ABLATION.value or HARDWARE.value[0]
    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("simulate", total=len(inputs) * len(HARDWARE.value))
        for given in inputs:
            for name in HARDWARE.value:
                label = f"{given.label} {name}"
                progress.update(task, description=label)
                case = run_case(given.train, given.test, get_machine(name), slots=given.slots)
                cases[label] = case_figures(given, case)
                if name == ablated:
                    ablation[label] = ablation_figures(given, name)
                progress.advance(task)
    return {**summary_figures(cases), "cases": cases, "ablation_ms": ablation}


def main() -> None:
    batches = parse_numbers("batches", BATCHES.value)
    fraction = parse_fraction("experts_on_device", EXPERTS.value)
    plot_path = plot_file.path_of("times_plot", TIMES.value)
    for name in HARDWARE.value:
        get_machine(name)
    check(bool(HARDWARE.value) and bool(TRACES.value), "--traces and --hardware name one or more")
    ablated = ABLATION.value
    check(ablated in (None, *HARDWARE.value), f"--ablation_hardware={ablated} is not in --hardware")
    inputs = []
    for name in TRACES.value:
        facts_of(name)
        trace, _ = open_trace(name)
        inputs += [make_input(name, trace, batch, fraction) for batch in batches]
    console = Console()
    figures = {
        "experts_on_device": fraction,
        "recall": RECALL.value,
        **run_cases(console, inputs),
    }
    print_tables(console, figures)
    cli.write_report("simulate_offload", "simulated", figures)
    if plot_path:
        plot(figures, plot_path)
    plot_file.print_written(console, plot_path)


if __name__ == "__main__":
    cli.run(main)
