"""The plot of `experiments.offload_bench`: a step's time of every policy against its bound."""

import logging
from typing import Any

import matplotlib

matplotlib.use("Agg")
logging.getLogger("matplotlib").setLevel(logging.WARNING)  # "generated new fontManager"

import matplotlib.pyplot as plt  # noqa: E402

from experiments import cli  # noqa: E402
from experiments.plot_file import png_of  # noqa: E402


def plot(figures: dict[str, Any], path: str) -> None:
    """Draws `figures` of a report, a panel per batch size, and writes a PNG."""
    batches = figures["batch"]
    figure, axes = plt.subplots(
        1, len(batches), figsize=(1.5 + 3.4 * len(batches), 4), layout="constrained", squeeze=False
    )
    for panel, (size, found) in zip(axes[0], batches.items(), strict=True):
        names = list(found["policies"])
        rows = range(len(names))
        measured = [found["policies"][name]["ms_per_step"] for name in names]
        bounds = [found["policies"][name]["bound_ms"] for name in names]
        panel.barh(rows, measured, color="#56b4e9", label="measured")
        panel.plot(bounds, rows, "|", color="black", ms=12, label="bound")
        panel.axvline(found["resident_ms"], color="#d55e00", linewidth=1, label="resident")
        panel.set_yticks(rows, names if panel is axes[0][0] else [])
        panel.invert_yaxis()
        panel.set_title(f"batch {size}", fontsize="medium")
        panel.set_xlabel("ms per step")
    axes[0][0].legend(frameon=False, fontsize="small")
    cli.write_bytes(path, png_of(figure))
