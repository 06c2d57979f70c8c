"""Quickstart step 5: the pictures."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import cli
from experiments.plot_file import png_of
from experiments.quickstart_steps.decode import ModeResult
from experiments.quickstart_steps.predict import LABELS

NATS_PER_BIT = float(np.log(2))


def _save(axes: Axes, path: pathlib.Path, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    figure = axes.get_figure(root=True)
    assert figure is not None
    _write(figure, path)


def _write(figure: Figure, path: pathlib.Path) -> None:
    figure.tight_layout()
    cli.write_bytes(path, png_of(figure))


def _axes(width: float = 7.0, height: float = 4.2) -> Axes:
    return plt.subplots(figsize=(width, height))[1]


def plot_loss(
    path: pathlib.Path, cross_entropy: np.ndarray, references: dict[str, float], heldout: float
) -> None:
    """Training loss in bits per byte against steps, smoothed, with the n-grams beside it."""
    axes = _axes()
    bits = np.asarray(cross_entropy) / NATS_PER_BIT
    span = max(1, len(bits) // 60)
    smooth = np.convolve(np.pad(bits, (span - 1, 0), mode="edge"), np.ones(span) / span, "valid")
    axes.plot(bits, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each step")
    axes.plot(smooth, color="tab:blue", label=f"training, mean of {span}")
    axes.axhline(heldout, color="tab:green", label=f"held out, {heldout:.2f}")
    for (name, value), style in zip(references.items(), ("--", ":"), strict=False):
        axes.axhline(value, color="gray", linestyle=style, label=f"{name}, {value:.2f}")
    axes.set_ylim(0, min(8.5, bits.max() * 1.05))
    axes.legend()
    _save(axes, path, "Byte-level language model", "step", "bits per byte")


def plot_load(path: pathlib.Path, load: np.ndarray) -> None:
    """Heat map of the held-out expert load [L, E], 1.0 where even."""
    axes = _axes(8.5, 3.2)
    relative = load / np.maximum(load.mean(1, keepdims=True), 1e-9)
    image = axes.imshow(relative, aspect="auto", cmap="viridis", vmin=0)
    axes.figure.colorbar(image, ax=axes, label="load / mean")
    axes.set_yticks(range(len(load)))
    _save(axes, path, "Expert load on held-out files", "expert", "layer")


def plot_recall(path: pathlib.Path, recall: dict[str, list[float]], top_k: int) -> None:
    """Recall@k per target layer, one line per predictor."""
    axes = _axes()
    for name, values in sorted(recall.items(), key=lambda item: -float(np.mean(item[1]))):
        layers = np.arange(1, len(values) + 1)
        label = f"{LABELS[name]} ({np.mean(values):.2f})"
        axes.plot(layers, values, marker="o", markersize=4, label=label)
    axes.set_ylim(0, 1)
    axes.set_xticks(layers)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    title = f"Predicting the {top_k} experts of a layer from the layer before"
    _save(axes, path, title, "target layer", f"recall@{top_k} on held-out files")


def plot_slots(
    path: pathlib.Path, slots: list[int], num_experts: int, rates: dict[str, list[float]]
) -> None:
    """Hit rate of a per-layer cache against its slots, by policy (simulated on the trace)."""
    axes = _axes()
    labels = {"lru": "LRU", "lfu": "LFU", "belady": "Belady (knows the future)"}
    for name, values in rates.items():
        axes.plot(slots, values, marker="o", markersize=4, label=labels.get(name, name))
    axes.plot([0, num_experts], [0, 1], color="gray", linestyle=":", label="slots / experts")
    axes.set(ylim=(0, 1.02), xlim=(0, num_experts + 0.5))
    axes.legend()
    _save(axes, path, "Expert cache on held-out routing", "slots per layer", "hit rate")


def plot_modes(path: pathlib.Path, results: dict[int, dict[str, ModeResult]]) -> None:
    """Tokens per second and KiB moved per token of every mode, a pair of panels per batch."""
    figure, rows = plt.subplots(len(results), 2, figsize=(9, 2.4 * len(results)), squeeze=False)
    for (speed, traffic), (batch, modes) in zip(rows, results.items(), strict=True):
        names = list(modes)
        speed.barh(names, [m.tokens_per_s for m in modes.values()], color="tab:blue")
        speed.set(title=f"batch {batch}", xlabel="tokens per second")
        wasted = np.array([m.wasted_bytes_per_token / 1024 for m in modes.values()])
        moved = np.array([m.bytes_per_token / 1024 for m in modes.values()])
        traffic.barh(names, moved - wasted, color="tab:green", label="used")
        traffic.barh(names, wasted, left=moved - wasted, color="tab:red", label="wasted")
        traffic.set(title=f"batch {batch}", xlabel="KiB moved per token")
        traffic.legend(fontsize=8)
        for axes in (speed, traffic):
            axes.invert_yaxis()
    _write(figure, path)
