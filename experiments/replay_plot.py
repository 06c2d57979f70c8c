"""The plot of `experiments.replay_trace`: hit rate against cache size, one line per policy."""

import logging
from typing import Any

import matplotlib

matplotlib.use("Agg")
logging.getLogger("matplotlib").setLevel(logging.WARNING)  # "generated new fontManager"

import matplotlib.pyplot as plt  # noqa: E402

from experiments import cli  # noqa: E402
from experiments.plot_file import png_of  # noqa: E402

STYLES = {  # per-layer variants share the colour of the policy inside the layer
    "belady": ("Belady (knows the future)", "black", ":"),
    "layerlfu": ("LFU per layer", "#d55e00", "--"),
    "lfu": ("LFU", "#d55e00", "-"),
    "layer": ("LRU per layer", "#0072b2", "--"),
    "lru": ("LRU", "#0072b2", "-"),
    "random": ("random", "#999999", "-"),
}


def plot(figures: dict[str, Any], path: str) -> None:
    """Draws `figures` of a report and writes a PNG, complete or not at all."""
    figure, axes = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    _draw_policies(axes, figures)
    if recorded := figures.get("recorded"):
        label = f"recorded run, {recorded['hit_rate']:.1f} %"
        axes.axhline(recorded["hit_rate"], color="#009e73", linewidth=1, label=label)
    cycle = figures["experts_of_one_token_mib"]
    axes.axvline(cycle, color="#cc79a7", linewidth=1, label=f"one token's experts, {cycle:.4g} MiB")
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"cache in MiB (all experts: {figures['all_experts_mib']:.5g} MiB)")
    axes.set_ylabel("decode hit rate in %")
    axes.grid(alpha=0.3)
    axes.set_title(
        f"{figures['model']}: {figures['layers']} layers, {figures['num_experts']} experts, "
        f"top-{figures['top_k']}, {figures['decoded_tokens']} decoded tokens",
        fontsize="medium",
    )
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    cli.write_bytes(path, png_of(figure, dpi=130))


def _draw_policies(axes, figures: dict[str, Any]) -> None:
    over = figures["decode_calls_over_budget"]
    for policy in [name for name in STYLES if name in figures["hit_rate"]]:
        label, color, style = STYLES[policy]
        rates = figures["hit_rate"][policy]
        budgets = [float(key) for key in rates]
        axes.plot(budgets, list(rates.values()), style, color=color, label=label)
        for key, rate in rates.items():
            face = "white" if over[policy][key] else color
            axes.plot(float(key), rate, "o", color=color, mfc=face, ms=4, clip_on=False, zorder=3)
    if any(count for row in over.values() for count in row.values()):
        axes.plot([], [], "o", color="gray", mfc="white", ms=4, label="overruns its budget")
    keys = list(next(iter(figures["hit_rate"].values())))
    axes.set_xscale("log", base=2)
    axes.set_xticks([float(key) for key in keys], keys)
    axes.minorticks_off()
