"""What quantised experts cost a trained model: error of a layer, held-out bits per byte, bytes.

    python -m experiments.quantized_experts --workdir=workdir --json=results/quantized_experts.json

`--workdir` is that of a finished run of `experiments.quickstart`; the held-out text is its. Every
format is made from the float32 checkpoint and evaluated by the very kernels that serve it.
`docs/quantization.md` says what the formats are.
"""

import pathlib
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from configs.quickstart import QuickstartConfig, get_config
from experiments import cli
from experiments.quickstart_steps.train import checkpoint_folder
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.core.overlay import overlay
from moejax.data.text import load_corpus, sample_windows
from moejax.experts.gated import gated_mlp
from moejax.experts.quantize import quantize_experts
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.quantized import Format, dequantize_tree
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.models.experts import join_experts, split_experts
from moejax.models.restore import restore_params
from moejax.offload.store import expert_bytes
from moejax.training.evaluate import evaluate

WORKDIR = flags.DEFINE_string("workdir", "workdir", "folder of a finished quickstart")
SET = cli.define_set()
_ROWS = 64  # of a layer's input


def main() -> None:
    cli.check_writable(cli.JSON.value)
    folder = pathlib.Path(WORKDIR.value)
    check(WORKDIR.value != "" and folder.is_dir(), f"--workdir={WORKDIR.value} is not a folder")
    cfg = overlay(get_config(), SET.value)
    check(cfg.eval_bytes >= 1, f"eval_bytes={cfg.eval_bytes} must be at least 1")
    params, model = restore_params(
        checkpoint_folder(folder), mesh=make_mesh(), expert_memory="device"
    )
    dense, experts = split_experts(params, model)
    score = _scorer(cfg, model)
    formats = {"float32": measure(experts, experts, partial(score, dense))}
    for name in get_args(Format):
        quantized = quantize_experts(experts, name)
        formats[name] = measure(quantized, experts, partial(score, dense))
    for figures in formats.values():
        figures["added_bits_per_byte"] = (
            figures["bits_per_byte"] - formats["float32"]["bits_per_byte"]
        )
    cli.write_report("quantized_experts", "numerics", {"formats": formats})
    show(formats)


def _scorer(cfg: QuickstartConfig, model: DecoderConfig):
    """(parameters without experts, experts) -> held-out bits per byte."""
    heldout, seq_len = load_corpus(cfg.data).heldout.data, cfg.train.seq_len
    starts = sample_windows(len(heldout), seq_len, cfg.eval_bytes)

    def score(dense: DecoderParams, experts: GatedWeights) -> float:
        params = join_experts(dense, experts, model)
        options = {"seq_len": seq_len, "batch_size": cfg.eval_batch_size}
        return evaluate(params, heldout, starts, model, **options)[0]

    return score


def measure(experts: GatedWeights, exact: GatedWeights, score) -> dict[str, Any]:
    """Figures of `experts` [L, E, ...] beside the `exact` ones; `score` gives bits per byte."""
    stood_for = dequantize_tree(experts, jnp.float32)
    of_weights = [
        relative_error(np.asarray(got), np.asarray(want))
        for got, want in zip(jax.tree.leaves(stood_for), jax.tree.leaves(exact), strict=True)
    ]
    of_layers = layer_errors(stood_for, exact)
    weights = sum(leaf.size for leaf in jax.tree.leaves(exact)) // exact.w_gate[:, :, 0, 0].size
    return {
        "bytes_per_expert": expert_bytes(experts),
        "bits_per_weight": 8 * expert_bytes(experts) / weights,
        "weight_error": max(of_weights),
        "layer_error_lowest": min(of_layers),
        "layer_error_highest": max(of_layers),
        "bits_per_byte": score(experts),
    }


def layer_errors(experts: GatedWeights, exact: GatedWeights) -> list[float]:
    """Relative error of each layer's outputs, all experts on normal rows."""
    rows = jax.random.normal(jax.random.key(0), (_ROWS, exact.w_gate.shape[2]))
    run = jax.jit(jax.vmap(gated_mlp, (0, None)))  # [E, T, D]

    def error(layer: int) -> float:
        both = [jax.tree.map(lambda leaf: leaf[layer], weights) for weights in (experts, exact)]
        return relative_error(*(np.asarray(run(weights, rows)) for weights in both))

    return [error(layer) for layer in range(exact.w_gate.shape[0])]


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Root mean square of the difference over that of `want`."""
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def show(formats: dict[str, dict[str, Any]]) -> None:
    """Prints the figures as a table."""
    table = Table()
    titles = ("experts", "bytes", "bits/weight", "weights %", "layer %", "bits/byte", "added")
    for title in titles:
        table.add_column(title, justify="left" if title == "experts" else "right")
    for name, one in formats.items():
        low, high = 100 * one["layer_error_lowest"], 100 * one["layer_error_highest"]
        table.add_row(
            name,
            f"{one['bytes_per_expert']:,}",
            f"{one['bits_per_weight']:.2f}",
            f"{100 * one['weight_error']:.2f}",
            f"{low:.2f} .. {high:.2f}",
            f"{one['bits_per_byte']:.4f}",
            f"{one['added_bits_per_byte']:+.4f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    cli.run(main)
