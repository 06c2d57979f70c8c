"""Local routing consistency of a recorded model: SRP, SCH, and what LRU, LFU and Belady hit.

    python -m experiments.routing_consistency --trace=qwen \\
        --json=results/routing_consistency_qwen.json

`docs/offloading.md` defines the measures. Figures are fractions: `srp` {m}, `sch` {m: {rho}} and
`lru`, `lfu`, `belady` {rho}, where m counts tokens and rho is a layer's cache over top-k.
"""

from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli, plot_file
from experiments.plot_file import png_of
from experiments.traces import TRACE, open_trace
from moejax.core.errors import InputError, check
from moejax.data.routing_trace import RoutingTrace
from moejax.simulator.consistency import Consistency, entries, measure_consistency

WINDOWS = flags.DEFINE_list("windows", ["4", "16", "64"], "m: tokens of a window, or seen ahead")
RHO = flags.DEFINE_list("rho", ["1", "2", "3", "4", "6", "8"], "entries of a layer over top_k")
CURVES = flags.DEFINE_string("hit_plot", None, "PNG to write; beside --json when not given")
ONLINE = ("lru", "lfu", "belady")


def parse_windows(texts: list[str]) -> list[int]:
    """Splits `--windows`."""
    good = all(text.isascii() and text.isdigit() and int(text) > 0 for text in texts)
    check(good and bool(texts), f"--windows={','.join(texts)}: not positive whole numbers")
    return sorted({int(text) for text in texts})


def parse_rho(texts: list[str], trace: RoutingTrace) -> dict[str, int]:
    """Entries of a layer's cache for every `--rho`, keyed by its text."""
    sizes = {}
    for text in texts:
        try:
            rho = float(text)
        except ValueError:
            raise InputError(f"--rho={','.join(texts)}: {text!r} is not a number") from None
        check(0 < rho < 1e6, f"--rho={','.join(texts)}: {text!r} is not between 0 and 1e6")
        sizes[f"{rho:g}"] = entries(rho, trace.top_k, trace.num_experts)
    return dict(sorted(sizes.items(), key=lambda size: float(size[0])))


def figures_of(trace: RoutingTrace, measured: Consistency, sizes: dict[str, int]) -> dict[str, Any]:
    """The report's figures."""

    def at_rho(rates: np.ndarray) -> dict[str, float]:
        return {rho: round(float(rates[size]), 6) for rho, size in sizes.items()}

    segments = measured.segments
    return {
        "model": trace.meta.get("model", "unknown model"),
        "layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "tokens": trace.num_tokens,
        "sequences": len(trace.sequence_lengths),
        "sequences_excluded": {str(m): count for m, count in measured.excluded.items()},
        "srp": {str(m): round(segments[m].srp, 6) for m in segments},
        "srp_rho": {str(m): round(segments[m].cache, 6) for m in segments},
        "srp_by_layer": {str(m): [round(x, 6) for x in segments[m].layer_srp] for m in segments},
        "sch": {str(m): at_rho(rates) for m, rates in measured.sch.items()},
        **{name: at_rho(getattr(measured, name)) for name in ONLINE},
    }


def print_tables(console: Console, figures: dict[str, Any]) -> None:
    """SRP by window, hit rates by rho."""
    title = f"{figures['model']}: top-{figures['top_k']} of {figures['num_experts']}"
    table = Table("m", "SRP", "its rho", "sequences left out", title=title, title_justify="left")
    for m, srp in figures["srp"].items():
        left_out = f"{figures['sequences_excluded'][m]} of {figures['sequences']}"
        table.add_row(m, f"{srp:.3f}", f"{figures['srp_rho'][m]:.2f}", left_out)
    console.print(table)
    table = Table("hit rate at rho =", *figures["lru"])
    for m, row in figures["sch"].items():
        table.add_row(f"SCH({m})", *(f"{rate:.3f}" for rate in row.values()))
    for name in ONLINE:
        table.add_row(name, *(f"{rate:.3f}" for rate in figures[name].values()))
    console.print(table)


def plot(figures: dict[str, Any], measured: Consistency, path: str) -> None:
    """Draws hit rates of every cache size, and SRP at the cache it asks for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    k = figures["top_k"]
    rho = np.arange(k, figures["num_experts"] + 1) / k
    for name, color in zip(ONLINE, ("#0072b2", "#d55e00", "black"), strict=True):
        axes.plot(rho, getattr(measured, name)[k:], color=color, label=name)
    for (m, rates), style in zip(measured.sch.items(), ("--", "-.", ":", "--", "-."), strict=False):
        axes.plot(rho, rates[k:], style, color="#009e73", label=f"SCH({m})")
        srp = (figures["srp_rho"][str(m)], figures["srp"][str(m)])
        axes.plot(*srp, "o", color="#cc79a7")
        axes.annotate(f"SRP({m})", srp, textcoords="offset points", xytext=(5, -9), fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1)
    axes.set_xlabel("rho: entries of a layer's cache / top-k")
    axes.set_ylabel("hit rate; SRP is an F1")
    axes.set_title(f"{figures['model']}, {figures['tokens']} tokens", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    cli.write_bytes(path, png_of(figure, dpi=130))


def main() -> None:
    windows = parse_windows(WINDOWS.value)
    plot_path = plot_file.path_of("hit_plot", CURVES.value)
    trace, _ = open_trace(TRACE.value)
    sizes = parse_rho(RHO.value, trace)
    console = Console()
    with console.status("hit rates of all cache sizes"):
        measured = measure_consistency(trace, windows)
    figures = figures_of(trace, measured, sizes)
    print_tables(console, figures)
    cli.write_report("routing_consistency", "simulated", figures)
    if plot_path:
        plot(figures, measured, plot_path)
    plot_file.print_written(console, plot_path)


if __name__ == "__main__":
    cli.run(main)
