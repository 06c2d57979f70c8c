"""Training with less communication, method by method: held-out loss and bytes sent.

    python -m experiments.sync_methods --json=results/sync_methods.json \
        --losses_plot=results/sync_methods.png

Eight workers (CPU devices) train a byte-level mixture of experts with equal tokens, data order and
initial weights per seed. Controls without feedback say what feedback is worth. Losses are those of
the mean of the workers' weights; bytes are those that one worker sends, averaged over steps, from
the schedules that run (`moejax.sync`), checked against compiled programs by the tests.
"""

import dataclasses
import io
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from configs.run import ModelConfig
from experiments import cli
from moejax.collectives.codecs import BlockQuant, TopK
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.data.source import RandomWindows
from moejax.data.text import TextConfig, load_corpus, sample_windows
from moejax.models.decoder import init_decoder
from moejax.sync.dream import plan_layers
from moejax.sync.fragments import by_layer, size, strided, whole
from moejax.sync.plan import Outer, SyncPlan, cd_sgd, diloco, local_sgd, partial_local_sgd
from moejax.sync.plan import streaming_diloco as streaming
from moejax.sync.reduce import sent_bytes
from moejax.sync.transform import bytes_per_step, reduce_gradients, synchronise
from moejax.training.config import TrainConfig
from moejax.training.evaluate import evaluate
from moejax.training.workers import Exchange, consensus, init_workers, make_worker_step

STEPS = flags.DEFINE_integer("steps", 240, "steps of each run", lower_bound=1)
SEEDS = flags.DEFINE_integer("seeds", 3, "runs per method", lower_bound=1)
METHODS = flags.DEFINE_list("methods", None, "some of the methods; default: all")
DATA = flags.DEFINE_string("text", None, "text file or folder; default: the standard library")
PLOT = flags.DEFINE_string("losses_plot", None, "where to write the losses over bytes, as PNG")
WORKERS, AXES, PERIOD = 8, ("data",), 8
LEARNING_RATE = 4e-3
TOPK_SHARE, TOPK_BLOCK, THRESHOLD, EXACT_EVERY = 50, 1000, 1e-3, 8
MODEL = ModelConfig(
    num_layers=2,
    d_model=64,
    d_ff=64,
    num_experts=8,
    top_k=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
)


@dataclasses.dataclass(frozen=True)
class Method:
    """What workers exchange, and the bytes that one sends per step on average."""

    exchange: Exchange
    bytes_per_step: float


def methods(params: Any) -> dict[str, Callable[[], Method]]:
    """Every method by name, for weights of these shapes."""
    everything, layers = whole(params), by_layer(params)
    n = size(params, everything[0])
    top = TopK(TOPK_BLOCK // TOPK_SHARE, TOPK_BLOCK)
    delayed = cd_sgd(THRESHOLD, EXACT_EVERY)

    def gradients(codec: Any = None, feedback: bool = True) -> Method:
        exchange = Exchange(gradients=reduce_gradients(AXES, codec, feedback))
        return Method(exchange, sent_bytes(n, WORKERS, codec))

    def weights(plan: SyncPlan, fragments: Any = everything) -> Method:
        sent = bytes_per_step(plan, fragments, params, WORKERS)
        return Method(Exchange(weights=synchronise(plan, fragments, AXES)), sent)

    def dream() -> Method:
        # A backward pass as long as half of the transfers, both by the number of weights.
        transfer = [float(size(params, layer)) for layer in layers]
        plan = plan_layers([t / 2 / PERIOD for t in transfer], transfer, PERIOD)
        return weights(partial_local_sgd(plan.when, PERIOD), layers)

    return {
        "synchronous": gradients,
        "int8": lambda: gradients(BlockQuant()),
        "top-k": lambda: gradients(top),
        "top-k, no feedback": lambda: gradients(top, feedback=False),
        "local SGD": lambda: weights(local_sgd(PERIOD)),
        "DreamDDP": dream,
        "DiLoCo": lambda: weights(diloco(PERIOD, Outer(learning_rate=0.7, momentum=0.5))),
        "Streaming DiLoCo": lambda: weights(
            streaming(PERIOD, 2, Outer(learning_rate=0.7, momentum=0.5), keep_local=0.25),
            strided(layers, 2),
        ),
        "CD-SGD": lambda: weights(delayed),
        "CD-SGD, no feedback": lambda: weights(dataclasses.replace(delayed, feedback=False)),
    }


def run_method(method: Method, model: Any, corpus: Any, cfg: TrainConfig, seeds: int) -> list[dict]:
    """Trains once per seed; held-out nats per token of the mean weights, nats of every step."""
    mesh, steps = make_mesh(data=WORKERS), cfg.horizon_steps
    assert steps is not None
    step, results = make_worker_step(model, cfg, mesh, method.exchange), []
    for seed in range(seeds):
        cfg = dataclasses.replace(cfg, seed=seed)
        state = init_workers(model, cfg, mesh, method.exchange)
        shape = dict(batch_size=cfg.batch_size, seq_len=cfg.seq_len)
        source = RandomWindows(data=corpus.train.data, seed=seed, **shape)
        history, begin = [], time.perf_counter()
        batches = source.batches(0, np.arange(cfg.batch_size))
        for i, tokens in zip(range(steps), batches, strict=False):
            state, metrics = step(state, jnp.asarray(tokens), jnp.float32(i / steps))
            history.append(metrics.cross_entropy)
        train = [float(np.mean(one)) for one in jax.device_get(history)]
        seconds = time.perf_counter() - begin
        heldout = score(consensus(state), corpus.heldout.data, model, cfg)
        results.append({"heldout": heldout, "train": train, "seconds": seconds})
    return results


def score(params: Any, data: np.ndarray, model: Any, cfg: TrainConfig) -> float:
    """Nats per byte on fixed windows."""
    starts = sample_windows(len(data), cfg.seq_len, 64 * 1024)
    bits, _ = evaluate(params, data, starts, model, seq_len=cfg.seq_len, batch_size=32)
    return bits * math.log(2)


def draw(losses: dict[str, list[float]], sent: dict[str, float], path: str) -> None:
    """Held-out loss over bytes per step, a point per seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, values in losses.items():
        axes.plot([sent[name]] * len(values), values, "o", label=name, markersize=5)
    axes.set(xscale="log", xlabel="bytes sent per worker and step", ylabel="held-out nats per byte")
    axes.legend(fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    cli.write_bytes(path, picture.getvalue())


def main() -> None:
    cli.check_writable(cli.JSON.value)
    cli.check_writable(PLOT.value)
    cli.use_cpu_devices(WORKERS)
    model = MODEL.decoder()
    shapes = jax.eval_shape(lambda: init_decoder(jax.random.key(0), model))
    known = methods(shapes)
    names = METHODS.value or list(known)
    for name in names:
        check(name in known, f"--methods: {name!r} is not one of {list(known)}")
    corpus = load_corpus(TextConfig(path=DATA.value) if DATA.value else TextConfig())
    cfg = TrainConfig(
        batch_size=WORKERS, seq_len=64, horizon_steps=STEPS.value, learning_rate=LEARNING_RATE
    )
    results = {}
    for name in track(names, description="training", transient=True):
        results[name] = run_method(known[name](), model, corpus, cfg, SEEDS.value)
        scores = ", ".join(f"{one['heldout']:.4f}" for one in results[name])
        print(f"{name}: {scores}; {results[name][-1]['seconds']:.0f} s", flush=True)
    losses = {name: [one["heldout"] for one in runs] for name, runs in results.items()}
    train = {name: [one["train"] for one in runs] for name, runs in results.items()}
    sent = {name: known[name]().bytes_per_step for name in names}
    figures = {
        "heldout_loss": losses,
        "bytes_per_step": sent,
        "train_loss": train,
        "steps": STEPS.value,
        "period": PERIOD,
        "topk_share": 1 / TOPK_SHARE,
        "threshold": THRESHOLD,
        "exact_every": EXACT_EVERY,
        "num_params": size(shapes, whole(shapes)[0]),
    }
    if "synchronous" in names:
        base, full = statistics.mean(losses["synchronous"]), sent["synchronous"]
        table = Table("method", "held-out nats", "over synchronous", "bytes fewer")
        figures["over_synchronous"], figures["bytes_fewer"] = {}, {}
        for name in names:
            mean = statistics.mean(losses[name])
            figures["over_synchronous"][name] = mean / base - 1
            figures["bytes_fewer"][name] = full / sent[name]
            table.add_row(
                name, f"{mean:.4f}", f"{mean / base - 1:+.2%}", f"{full / sent[name]:.1f}x"
            )
        Console().print(table)
    cli.write_report("sync_methods", "numerics", figures)
    if PLOT.value:
        draw(losses, sent, PLOT.value)


if __name__ == "__main__":
    cli.run(main)
