"""Quickstart step 5: report.md, the figures of report.json, and the plots."""

import pathlib
from typing import Any

import numpy as np

from experiments.quickstart_steps import plots
from experiments.quickstart_steps.decode import Bandwidths, ModeResult
from experiments.quickstart_steps.predict import LABELS, PredictionResult
from experiments.quickstart_steps.train import Trained
from moejax.simulator.summary import hit_rate_by_slots


def slot_curve(prediction: PredictionResult) -> tuple[list[int], dict[str, list[float]]]:
    """Simulated hit rates of the held-out routing against slots per layer."""
    trace = prediction.trace
    step = max(1, trace.num_experts // 8)
    slots = list(range(trace.top_k, trace.num_experts, step)) + [trace.num_experts]
    return slots, hit_rate_by_slots(trace, slots, ("lru", "lfu", "belady"))


def figures_of(
    training: Trained,
    prediction: PredictionResult,
    decoding: dict[int, dict[str, ModeResult]],
    identical: dict[int, bool],
    bandwidths: Bandwidths,
    curve: tuple[list[int], dict[str, list[float]]],
) -> dict[str, Any]:
    """`figures` of report.json. Modes at top level are those of the first batch size."""
    recall = prediction.recall_at_k
    first = next(iter(decoding.values()))
    return {
        "heldout_bits_per_byte": training.bits["model"],
        "bigram_bits_per_byte": training.bits["bigram"],
        "trigram_bits_per_byte": training.bits["trigram"],
        "tokens_identical": all(identical.values()),
        "recall_at_k": {name: float(np.mean(values)) for name, values in recall.items()},
        "recall_at_k_per_layer": recall,
        **{mode: result.figures() for mode, result in first.items()},
        "decode": {
            str(batch): {mode: result.figures() for mode, result in modes.items()}
            for batch, modes in decoding.items()
        },
        "hit_rate_by_slots": {"slots": curve[0], **curve[1]},
        "device_read_gb_per_s": bandwidths.device_read / 1e9,
        "host_fetch_gb_per_s": bandwidths.host_fetch / 1e9,
        "training_steps": len(training.result.history["cross_entropy"]),
    }


def draw(
    workdir: pathlib.Path,
    training: Trained,
    prediction: PredictionResult,
    decoding: dict[int, dict[str, ModeResult]],
    curve: tuple[list[int], dict[str, list[float]]],
) -> None:
    """All plots."""
    references = {name: training.bits[name] for name in ("bigram", "trigram")}
    plots.plot_loss(
        workdir / "loss.png",
        training.result.history["cross_entropy"],
        references,
        training.bits["model"],
    )
    plots.plot_load(workdir / "expert_load.png", training.expert_load)
    plots.plot_recall(workdir / "recall.png", prediction.recall_at_k, prediction.top_k)
    slots, rates = curve
    plots.plot_slots(workdir / "hit_rate.png", slots, prediction.trace.num_experts, rates)
    plots.plot_modes(workdir / "decode.png", decoding)


def markdown(record: dict, sample: tuple[str, str]) -> str:
    """report.md from report.json's record and a generated sample."""
    f = record["figures"]
    ratio = f["heldout_bits_per_byte"] / f["bigram_bits_per_byte"]
    lines = [
        "# Quickstart report",
        "",
        f"{record['device']}, jax {record['versions']['jax']}, commit {record['commit']}, "
        f"{record['date']}. Rung: {record['rung']}.",
        "",
        "## 1. Language model",
        "",
        f"Held-out **{f['heldout_bits_per_byte']:.3f}** bits per byte after "
        f"{f['training_steps']} steps: {ratio:.2f} of a bigram's {f['bigram_bits_per_byte']:.3f}, "
        f"trigram {f['trigram_bits_per_byte']:.3f} (both counted on all training bytes).",
        "",
        "![loss](loss.png)",
        "![expert load](expert_load.png)",
        "",
        "## 2. Predicting the next layer's experts",
        "",
        "Mean over layers of the recall of the true experts among as many guesses, held-out files.",
        "",
        "| predictor | recall@k |",
        "|---|---|",
        *(f"| {LABELS[name]} | {value:.3f} |" for name, value in f["recall_at_k"].items()),
        "",
        "![recall](recall.png)",
        "",
        "## 3. Decoding past device memory",
        "",
        f"Tokens identical in all modes: **{f['tokens_identical']}**. Measured in this run: device "
        f"read {f['device_read_gb_per_s']:.1f} GB/s, host fetch {f['host_fetch_gb_per_s']:.1f} "
        "GB/s. The bound is the larger of reading the active weights once and moving the bytes "
        "that were moved; `of bound` is bound time over measured time. On a CPU the host memory "
        "is the device memory, so the modes show correctness and traffic, not a speed-up.",
        "",
        *_decode_tables(f["decode"]),
        "![decode](decode.png)",
        "",
        "Hit rate against slots, simulated on the recorded held-out routing:",
        "",
        "![hit rate](hit_rate.png)",
        "",
        "## 4. A sample",
        "",
        "Prompt, then what the model wrote:",
        "",
        *_quoted(sample[0]),
        "",
        *_quoted(sample[1]),
        "",
    ]
    return "\n".join(lines)


def _decode_tables(decode: dict) -> list[str]:
    lines = []
    for batch, modes in decode.items():
        lines += [
            f"Batch {batch}:",
            "",
            "| mode | slots | tokens/s | hit rate | KiB moved / token | KiB wasted / token "
            "| of bound |",
            "|---|---|---|---|---|---|---|",
        ]
        for mode, m in modes.items():
            lines.append(
                f"| {mode} | {m['slots']} | {m['tokens_per_s']:.0f} | {m['hit_rate']:.1%} | "
                f"{m['bytes_per_token'] / 1024:.0f} | {m['wasted_bytes_per_token'] / 1024:.0f} | "
                f"{m['fraction_of_bound']:.1%} ({m['limited_by']}) |"
            )
        lines.append("")
    return lines


def _quoted(text: str) -> list[str]:
    """An indented code block, which no text can break out of."""
    printable = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return ["    " + line for line in printable.split("\n")]
