"""Figures, table and pictures of the comparison."""

import statistics
from typing import Any

import numpy as np
from rich.table import Table

from experiments.plot_file import png_of
from experiments.sync_steps.methods import METHODS

BOUND = 0.02  # over the loss of synchronous training


def figures_of(
    runs: dict[str, list[dict[str, Any]]], sent: dict[str, float], common_share: float
) -> dict[str, Any]:
    """Figures by method name.

    Args:
        runs: of each seed.
        sent: bytes per worker and step, after the common start.
        common_share: of all steps, those that are taken synchronously by all methods.
    """
    base, full = runs["synchronous"], sent["synchronous"]
    losses = {name: [run["heldout"] for run in each] for name, each in runs.items()}
    over = {
        name: [one / run["heldout"] - 1 for one, run in zip(each, base, strict=True)]
        for name, each in losses.items()
    }
    whole = {name: common_share * full + (1 - common_share) * one for name, one in sent.items()}
    figures = {
        "heldout_loss": losses,
        "over_synchronous": over,
        "bytes_per_step": sent,
        "bytes_fewer": {name: full / one for name, one in sent.items()},
        "bytes_fewer_whole_run": {name: full / one for name, one in whole.items()},
        "train_loss": {name: [run["train"] for run in each] for name, each in runs.items()},
        "seconds": {name: [run["seconds"] for run in each] for name, each in runs.items()},
    }
    return figures | {"holds": {name: holds(name, figures) for name in runs}}


def holds(name: str, figures: dict[str, Any]) -> bool | None:
    """Whether a method is as good as is asked of it; None where nothing is.

    Of a control: that it is worse than with feedback for every seed.
    """
    method, over = METHODS[name], figures["over_synchronous"]
    if method.control_of is not None:
        if method.control_of not in over:
            return None
        return all(a > b for a, b in zip(over[name], over[method.control_of], strict=True))
    if method.fewer is None:
        return None
    near = statistics.mean(over[name]) <= BOUND
    return near and figures["bytes_fewer"][name] >= method.fewer


def table_of(figures: dict[str, Any]) -> Table:
    """A row per method."""
    table = Table(
        "method", "held-out nats", "over synchronous", "bytes fewer", "whole run", "holds"
    )
    words = {True: "yes", False: "no", None: ""}
    for name, losses in figures["heldout_loss"].items():
        over = figures["over_synchronous"][name]
        table.add_row(
            name,
            f"{statistics.mean(losses):.4f}",
            f"{statistics.mean(over):+.2%} ({min(over):+.2%} to {max(over):+.2%})",
            f"{figures['bytes_fewer'][name]:.1f}x",
            f"{figures['bytes_fewer_whole_run'][name]:.1f}x",
            words[figures["holds"][name]],
        )
    return table


def draw(figures: dict[str, Any], common_steps: int) -> bytes:
    """Held-out loss over bytes, a point per seed; and training loss over steps. As PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for name, over in figures["over_synchronous"].items():
        fewer = figures["bytes_fewer"][name]
        (line,) = left.plot([fewer] * len(over), np.array(over) * 100, "o", label=name)
        train = np.mean(figures["train_loss"][name], axis=0)
        width = max(1, len(train) // 20)
        smooth = np.convolve(train, np.ones(width) / width, "valid")
        at = common_steps + np.arange(len(smooth)) + width // 2
        right.plot(at, smooth, color=line.get_color(), linewidth=1, label=name)
    left.axhspan(-BOUND * 100, BOUND * 100, color="0.9")
    left.set(xscale="log", xlabel="times fewer bytes", ylabel="held-out loss over synchronous, %")
    right.set(xlabel="step", ylabel="training nats per byte, mean of seeds")
    left.legend(fontsize=7)
    return png_of(figure, tight=True)
