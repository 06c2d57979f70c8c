"""Tables and the plot of `experiments/predictor_effect.py`."""

from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.plot_file import png_of


def print_simulated(console: Console, cases: dict[str, Any]) -> None:
    """One table per case: gains over the same without predictions."""
    for label, case in cases.items():
        title = (
            f"simulated, {label}: w / tau {case['window_over_tau']:.2f}, "
            f"{case['misses_per_layer']:.1f} misses of a layer, LRU "
            f"{case['none']['tokens_per_s']:.1f} tokens/s, planned "
            f"{case['none_planned']['tokens_per_s']:.1f} ({case['none_planned']['plan']})"
        )
        columns = ("1st, 2nd, 4th guess right", "lanes", "gain", "all guesses", "planned", "plan")
        table = Table("predictor", *columns, title=title, title_justify="left")
        for name, one in case["predictors"].items():
            first = [f"{p:.2f}" for p in (one["precision_by_rank"] + [0] * 4)[:4]]
            table.add_row(
                name,
                " ".join((first[0], first[1], first[3])),
                str(one["lanes"]),
                *(f"{100 * one[way]['gain']:+.1f} %" for way in ("by_rule", "all_guesses")),
                f"{100 * one['planned']['gain']:+.1f} %",
                one["planned"]["plan"],
            )
        console.print(table)


def print_measured(console: Console, found: dict[str, Any]) -> None:
    """One table per batch size."""
    for batch, one in found.items():
        title = (
            f"measured, batch {batch}: {one['num_slots']} slots, {one['lanes']} lanes; resident "
            f"{one['resident_tokens_per_s']:.0f} tokens/s"
        )
        columns = ("tokens/s", "gain", "hits", "kB moved / token", "wasted", "of prefetched wanted")
        table = Table("predictor", *columns, title=title, title_justify="left")
        for name, row in one["predictors"].items():
            table.add_row(
                name,
                f"{row['tokens_per_s']:.0f}",
                f"{100 * row['gain']:+.0f} %",
                f"{row['hit_rate']:.3f}",
                f"{row['moved_bytes_per_token'] / 1e3:.0f}",
                f"{row['wasted_bytes_per_token'] / 1e3:.0f}",
                f"{row['prefetched_and_wanted']:.2f}",
            )
        console.print(table)


def plot(figures: dict[str, Any], path: str) -> None:
    """Simulated gain of every predictor by case, with lanes by the rule and with every guess."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = figures["simulated"]
    height = 1.8 + 0.3 * len(cases)
    figure, axes = plt.subplots(1, 2, figsize=(10, height), layout="constrained", sharey=True)
    rows = range(len(cases))
    titles = ("lanes by the rule", "every guess moved")
    for axis, way, title in zip(axes, ("by_rule", "all_guesses"), titles, strict=True):
        for name in next(iter(cases.values()))["predictors"]:
            gains = [100 * case["predictors"][name][way]["gain"] for case in cases.values()]
            axis.plot(gains, rows, "|" if name == "perfect" else ".", ms=9, label=name)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("simulated tokens/s over LRU without prediction, %")
        axis.grid(alpha=0.3)
    axes[0].set_yticks(rows, [*cases], fontsize=7)
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, fontsize="x-small")
    cli.write_bytes(path, png_of(figure, dpi=130))
