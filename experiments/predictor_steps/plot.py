"""The plot of `experiments.predictors`: recall@k by layer, and its mean by horizon."""

import logging
from typing import Any

import matplotlib

matplotlib.use("Agg")
logging.getLogger("matplotlib").setLevel(logging.WARNING)  # "generated new fontManager"

import matplotlib.pyplot as plt  # noqa: E402

from experiments import cli  # noqa: E402
from experiments.plot_file import png_of  # noqa: E402
from experiments.predictor_steps.fold import LABELS  # noqa: E402

COLORS = ("#999999", "#56b4e9", "#d55e00", "#009e73")
STYLES = ("-", "--", "-.", ":")


def plot(figures: dict[str, Any], path: str) -> None:
    """Draws `figures` of a report and writes a PNG."""
    figure, (layers, horizons) = plt.subplots(
        1, 2, figsize=(9.5, 4.2), layout="constrained", sharey=True, width_ratios=(1.7, 1)
    )
    k = str(figures["top_k"])
    for (name, label), color in zip(LABELS.items(), COLORS, strict=True):
        by_layer = figures["recall_by_layer"][name]
        for horizon, style in zip(("1", str(len(by_layer))), STYLES, strict=False):
            targets = range(int(horizon), figures["layers"])
            text = f"{label}, {horizon} ahead"
            layers.plot(targets, by_layer[horizon], style, color=color, label=text)
        recall = figures["recall"][name]
        ahead = [int(h) for h in recall]
        horizons.plot(ahead, [recall[h][k] for h in recall], "o-", color=color, label=label)
    layers.set_xlabel("target layer")
    layers.set_ylabel(f"recall@{k}")
    layers.set_ylim(0, 1)
    layers.set_title(f"{figures['model']}, {figures['tokens']} tokens", fontsize="medium")
    horizons.set_xlabel("layers ahead")
    horizons.set_xticks(ahead)
    horizons.set_title(f"mean, {figures['folds']} folds", fontsize="medium")
    for axes in (layers, horizons):
        axes.grid(alpha=0.3)
    layers.legend(frameon=False, fontsize="x-small", ncols=2)
    cli.write_bytes(path, png_of(figure, dpi=130))
