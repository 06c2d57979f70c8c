"""The plot of `experiments.simulate_offload`: each policy's time over the chosen plan's."""

import logging
from typing import Any

import matplotlib

matplotlib.use("Agg")
logging.getLogger("matplotlib").setLevel(logging.WARNING)  # "generated new fontManager"

import matplotlib.pyplot as plt  # noqa: E402

from experiments import cli  # noqa: E402
from experiments.plot_file import png_of  # noqa: E402

COLORS = ("#999999", "#0072b2", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#e69f00",
          "black")  # fmt: skip


def plot(figures: dict[str, Any], path: str) -> None:
    """Draws `figures` of a report, one row per case, and writes a PNG."""
    cases = figures["cases"]
    height = 1.6 + 0.19 * len(cases)
    figure, axes = plt.subplots(figsize=(8.5, height), layout="constrained")
    rows = range(len(cases))
    names = list(next(iter(cases.values()))["fixed_ms"])
    for name, color in zip(names, COLORS, strict=True):
        over = [case["fixed_ms"][name] / case["chosen_ms"] for case in cases.values()]
        axes.plot(over, rows, "o", color=color, ms=4, label=name)
    bound = [1 / case["over_fractional"] for case in cases.values()]
    axes.plot(bound, rows, "|", color="red", ms=8, label="fractional bound")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(rows, list(cases), fontsize=6)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel("simulated time over that of the chosen plan")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", frameon=False, fontsize="small", ncols=5)
    cli.write_bytes(path, png_of(figure))
