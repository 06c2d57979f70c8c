"""What misses in few bits cost a trained model, and what they save: bits per byte beside bytes.

    python -m experiments.low_precision_misses --workdir=workdir --set eval_bytes=8192 \\
        --json=results/hobbit.json

The model of a finished `experiments.quickstart` reads held-out text byte by byte, as it would
decode it, with a quarter of its experts in slots. Missing experts that the rule of
`moejax.offload.precision` finds unimportant are moved in int4. A threshold of 1 moves all in full
and must give the exact bits; one below 0 moves none in full. Caches stay from window to window.

Axis letters:
    B  sequences read at once    S  positions    L  MoE layers    E  experts
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import cli
from experiments.quantized_experts import compare, heldout_windows, read_quickstart
from moejax.core.memory import device_sharding
from moejax.core.mesh import make_mesh
from moejax.core.structs import MoEMetrics
from moejax.data.text import windows
from moejax.kernels.quantized import Format
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams, forward, init_cache
from moejax.offload.precision import in_two_precisions
from moejax.offload.source import Store, moved_bytes, shapes_of
from moejax.offload.stage import OffloadConfig, OffloadState, init_state, offloaded
from moejax.offload.store import to_host
from moejax.training.loss import cross_entropy

FORMAT: Format = "int4"
THRESHOLDS = (1.0, 0.8, 0.6, -1.0)
BATCHES = (1, 8)


def main() -> None:
    cli.check_writable(cli.JSON.value)
    cfg, model, dense, experts = read_quickstart()
    store = to_host(experts, make_mesh())
    two = in_two_precisions(store, FORMAT)
    slots = model.num_moe_layers * model.moe.num_experts // 4
    arms: dict[str, tuple[Store, OffloadConfig]] = {
        "exact": (store, OffloadConfig(num_slots=slots))
    }
    for threshold in THRESHOLDS:
        offload = OffloadConfig(num_slots=slots, importance_threshold=threshold)
        arms[f"{threshold:g}"] = two, offload
    figures: dict[str, Any] = {"format": FORMAT, "num_slots": slots, "batch": {}}
    for size in BATCHES:
        heldout, starts = heldout_windows(cfg, size)
        texts = [windows(heldout, batch, cfg.train.seq_len) for batch in starts]
        read = {
            name: read_texts(dense, *arm, texts, model)
            for name, arm in track(arms.items(), f"batch {size}", transient=True)
        }
        exact = read["exact"][0]
        if not np.array_equal(read["1"][0], exact):
            raise RuntimeError("all misses in full gave other bits than the exact mode")
        figures["batch"][str(size)] = {
            name: compare(bits, exact) | moved for name, (bits, moved) in read.items()
        }
    cli.write_report("low_precision_misses", "numerics", figures)
    show(figures["batch"])


def read_texts(
    dense: DecoderParams,
    store: Store,
    offload: OffloadConfig,
    texts: list[np.ndarray],
    model: DecoderConfig,
) -> tuple[np.ndarray, dict[str, float]]:
    """Bits per byte of each text [B, S + 1], and what all of them moved."""
    # Where the program leaves it, or the second text would be compiled for again.
    state = jax.device_put(init_state(shapes_of(store), offload), device_sharding(make_mesh()))
    bits, counts = [], []
    for text in texts:
        state, nats, count = read(dense, store, state, jnp.asarray(text, jnp.int32), model, offload)
        bits.append(float(nats) / np.log(2))
        counts.append(count)
    total = jax.tree.map(lambda *each: float(np.sum(each)), *counts)
    moved = moved_bytes(store, fetches=total.demand_fetches, low_fetches=total.low_fetches)
    return np.array(bits), {
        "bytes_per_token": moved / sum(text[:, 1:].size for text in texts),
        "hit_rate": total.hits / total.lookups,
        "low_share_of_fetches": total.low_fetches / total.demand_fetches,
    }


@partial(jax.jit, static_argnames=("model", "offload"), donate_argnames="state")
def read(
    dense: DecoderParams,
    store: Store,
    state: OffloadState,
    text: jax.Array,
    model: DecoderConfig,
    offload: OffloadConfig,
) -> tuple[OffloadState, jax.Array, MoEMetrics]:
    """Teacher-forced steps over text int32 [B, S + 1]: mean nats, metrics summed over all."""
    stage, (batch, length) = offloaded(store, offload), text.shape
    kv = init_cache(model, batch, length - 1)

    def step(carry, token):
        kv, state = carry
        out = forward(dense, token[:, None], model, cache=kv, stage=stage, stage_state=state)
        return (out.cache, out.stage_state), (out.logits[:, 0], out.metrics)

    (_, state), (logits, metrics) = jax.lax.scan(step, (kv, state), text[:, :-1].T)
    nats = cross_entropy(jnp.swapaxes(logits, 0, 1), text[:, 1:])
    return state, nats.mean(), jax.tree.map(jnp.sum, metrics)


def show(batches: dict[str, dict[str, dict[str, float]]]) -> None:
    """One table, a row for every batch size and threshold."""
    table = Table(title=f"misses of little importance in {FORMAT}: lossy, but for exact and 1")
    titles = ("batch", "threshold", "bits/byte", "added", "+-", "KiB/token", "hits", "low fetches")
    for title in titles:
        table.add_column(title, justify="right")
    for size, arms in batches.items():
        for name, one in arms.items():
            table.add_row(
                size,
                name,
                f"{one['bits_per_byte']:.4f}",
                f"{one['added_bits_per_byte']:+.5f}",
                f"{one['added_standard_error']:.5f}",
                f"{one['bytes_per_token'] / 1024:.0f}",
                f"{one['hit_rate']:.3f}",
                f"{one['low_share_of_fetches']:.3f}",
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    cli.run(main)
