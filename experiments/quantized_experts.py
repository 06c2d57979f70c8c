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
    cfg, model, dense, experts = read_quickstart()
    score = _scorer(cfg, model)
    exact = score(dense, experts)
    formats = {"float32": measure(experts, experts) | compare(exact, exact)}
    for name in get_args(Format):
        quantized = quantize_experts(experts, name)
        formats[name] = measure(quantized, experts) | compare(score(dense, quantized), exact)
    cli.write_report("quantized_experts", "numerics", {"formats": formats})
    show(formats)


def read_quickstart() -> tuple[QuickstartConfig, DecoderConfig, DecoderParams, GatedWeights]:
    """The config, and the model that `--workdir` holds: parameters without experts, experts."""
    folder = pathlib.Path(WORKDIR.value)
    check(WORKDIR.value != "" and folder.is_dir(), f"--workdir={WORKDIR.value} is not a folder")
    cfg = overlay(get_config(), SET.value)
    check(cfg.eval_bytes >= 1, f"eval_bytes={cfg.eval_bytes} must be at least 1")
    params, model = restore_params(
        checkpoint_folder(folder), mesh=make_mesh(), expert_memory="device"
    )
    return cfg, model, *split_experts(params, model)


def heldout_windows(cfg: QuickstartConfig, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The held-out bytes, and where windows start in them: [n, size], batches of equal weight."""
    heldout, seq_len = load_corpus(cfg.data).heldout.data, cfg.train.seq_len
    starts = sample_windows(len(heldout), seq_len, cfg.eval_bytes)
    check(
        len(starts) >= 2 * size,
        f"eval_bytes={cfg.eval_bytes} make {len(starts)} windows; two batches of {size} are needed",
    )
    return heldout, starts[: len(starts) // size * size].reshape(-1, size)


def _scorer(cfg: QuickstartConfig, model: DecoderConfig):
    """(parameters without experts, experts) -> held-out bits per byte of each batch of windows."""
    heldout, batches = heldout_windows(cfg, cfg.eval_batch_size)

    def score(dense: DecoderParams, experts: GatedWeights) -> np.ndarray:
        params = join_experts(dense, experts, model)
        run = partial(
            evaluate, model=model, seq_len=cfg.train.seq_len, batch_size=cfg.eval_batch_size
        )
        return np.array([run(params, heldout, batch)[0] for batch in batches])

    return score


def compare(bits: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Bits per byte, what the format adds to the exact ones, and the standard error of that.

    Of the paired differences of batches: what is hard to predict is so for both.
    """
    added = bits - exact
    return {
        "bits_per_byte": float(bits.mean()),
        "added_bits_per_byte": float(added.mean()),
        "added_standard_error": float(added.std(ddof=1) / len(added) ** 0.5),
        "perplexity_ratio": float(2 ** added.mean()),
    }


def measure(experts: GatedWeights, exact: GatedWeights) -> dict[str, Any]:
    """Bytes and errors of `experts` [L, E, ...] beside the `exact` ones."""
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
    titles = ("experts", "bytes", "bits/weight", "weights %", "layer %", "bits/byte", "added", "+-")
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
            f"{one['added_bits_per_byte']:+.5f}",
            f"{one['added_standard_error']:.5f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    cli.run(main)
