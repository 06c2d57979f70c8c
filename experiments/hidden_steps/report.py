"""Figures, tables and the plot of `experiments/hidden_predictors.py`."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.hidden_steps.predict import HORIZONS
from experiments.hidden_steps.states import Recorded
from experiments.plot_file import png_of
from moejax.predictors.evaluate import Evaluation, evaluate
from moejax.predictors.llapor import layer_groups
from moejax.predictors.recording import take

LABELS = {
    "llapor": "LLaPor",
    "residual": "look-ahead",
    "history": "history",
    "next_gate": "next gate",
    "token_table": "token table",
    "bigram": "bigram",
    "previous_token": "previous token",
    "popularity": "popularity",
    "path": "routing path",
    "pre_attention": "pre-attention",
}


def figures_of(
    judged: dict[str, Evaluation], scores: dict[str, np.ndarray], held: Recorded, top_k: int
) -> dict[str, Any]:
    """Recall by predictor, horizon and m; by layer group and domain at m = k; other figures.

    A group is named after the layers that predict at horizon 1; its figures are means over their
    targets, the same layers for every predictor.
    """
    recall: dict[str, Any] = {}
    by_group: dict[str, Any] = {}
    for name, one in judged.items():
        skip = 1 - HORIZONS[name]  # layer 0, which those of horizon 1 do not predict
        targets = {m: np.array(each[skip:]) for m, each in one.recall.items()}
        recall[name] = {
            str(HORIZONS[name]): {str(m): float(each.mean()) for m, each in targets.items()}
        }
        groups = layer_groups(len(targets[top_k]) + 1)
        by_group[name] = {
            group: {str(m): float(each[[*layers]].mean()) for m, each in targets.items()}
            for group, layers in groups.items()
        }
    return {
        "recall": recall,
        "recall_by_group": by_group,
        "recall_by_target": {name: one.recall[top_k] for name, one in judged.items()},
        "exact_set": {name: float(np.mean(one.exact_set)) for name, one in judged.items()},
        "weight_mass": {
            name: float(np.mean(one.weight_mass[top_k])) for name, one in judged.items()
        },
        "wasted_bytes_per_token": {
            name: float(np.sum(one.wasted_bytes[top_k])) for name, one in judged.items()
        },
        "recall_by_domain": _by_domain(scores, held, top_k),
    }


def _by_domain(scores: dict[str, np.ndarray], held: Recorded, top_k: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for domain in dict.fromkeys(held.domains.tolist()):
        rows = np.flatnonzero(held.domains == domain)
        asked = take(held.routing, rows)
        for name, score in scores.items():
            skip = 1 - HORIZONS[name]
            one = evaluate(
                score[:, rows], asked, expert_bytes=0, horizon=HORIZONS[name], sizes=[top_k]
            )
            found.setdefault(name, {})[domain] = float(np.mean(one.recall[top_k][skip:]))
    return found


def print_quality(console: Console, quality: dict[str, Any]) -> None:
    """Bits per token of the model and of n-grams."""
    names = [*next(iter(quality["bits_per_token"].values()))]
    table = Table("held-out bits per token", *names, title_justify="left")
    for domain, bits in quality["bits_per_token"].items():
        table.add_row(domain, *(f"{bits[name]:.3f}" for name in names))
    console.print(table)
    load = quality["load_max_over_mean"]
    console.print(
        f"busiest expert over the mean: {min(load):.1f} to {max(load):.1f} by layer; "
        f"{quality['experts_never_used']} experts never used"
    )


def print_tables(console: Console, figures: dict[str, Any]) -> None:
    """Recall by layer group with bytes and time, and what tuning gains."""
    k = figures["model"]["top_k"]
    groups = [*figures["groups"]]
    table = Table(
        "predictor",
        "ahead",
        *groups,
        "mean",
        "exact",
        "KiB",
        "kflop",
        "us",
        title=f"recall@{k} by layer group; one evaluation for one token",
        title_justify="left",
    )
    for name, label in LABELS.items():
        horizon = HORIZONS[name]
        row = figures["recall_by_group"][name]
        cells = [f"{row[group][str(k)]:.3f}" for group in groups]
        cells.append(f"{figures['recall'][name][str(horizon)][str(k)]:.3f}")
        cells.append(f"{figures['exact_set'][name]:.3f}")
        cost = figures["cost"].get(name)
        if cost:
            cells += [f"{cost['bytes'] / 1024:,.0f}", f"{cost['flops'] / 1e3:.0f}"]
            cells.append(f"{cost['us']:.1f}")
        table.add_row(label, "path" if name == "path" else str(horizon), *cells)
    console.print(table)
    tuning = figures["tuning"]
    table = Table(
        "text",
        "as fitted",
        "tuned",
        "tuned, second half",
        "steps per layer",
        title=f"LLaPor fitted to {tuning['fitted_to']} alone, recall@{k} on held-out text",
        title_justify="left",
    )
    for domain, one in tuning["domains"].items():
        cells = [f"{one[name]:.3f}" for name in ("fixed", "tuned", "tuned_second_half")]
        table.add_row(domain, *cells, f"{np.mean(one['steps_per_layer']):.0f}")
    console.print(table)


def plot(figures: dict[str, Any], path: str) -> None:
    """Recall@k of every target layer, and recall against time of one evaluation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    k = figures["model"]["top_k"]
    for name, label in LABELS.items():
        values = figures["recall_by_target"][name]
        first = HORIZONS[name]
        line = left.plot(range(first, first + len(values)), values, ".-", label=label)
        cost = figures["cost"].get(name)
        if cost:
            mean = figures["recall"][name][str(first)][str(k)]
            right.plot(cost["us"], mean, "o", color=line[0].get_color())
            right.annotate(
                label, (cost["us"], mean), textcoords="offset points", xytext=(6, -3), fontsize=8
            )
    for layers in [*figures["groups"].values()][1:]:
        left.axvline(layers[0] + 0.5, color="grey", lw=0.8, ls=":")
    left.set_xlabel("target layer; dotted: layer groups")
    left.set_ylabel(f"recall@{k}, held-out files")
    left.legend(frameon=False, fontsize="x-small", ncols=2)
    right.set_xlabel("microseconds of one layer's scores, one token")
    right.set_ylabel(f"mean recall@{k}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 1)
    cli.write_bytes(path, png_of(figure, dpi=130))
