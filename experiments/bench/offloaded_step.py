"""What the slot table costs when everything is cached: offloaded against resident decode.

    python -m experiments.bench.offloaded_step --json=results/offloaded_step.json

One compiled step per token at a named shape. `resident` reads the chosen rows of one weight stack
in place: no table, no lookup, nothing that could miss. `cached` is the offloaded step whose slot
cache holds every expert. Both decode the same tokens; their ratio is the price of the indirection
(must be at most 1.15). Beside it: the time that reading the weights of a step once, of the experts
that it used, would take at the streaming bandwidth measured in the same run.
"""

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from configs.shapes import get_shape
from experiments import cli
from experiments.bench.shape_flags import BATCH, SHAPE
from experiments.bench.timing import ROUNDS, interleave, summary
from experiments.measure import stream_read_bytes_per_s
from moejax.core.mesh import make_mesh
from moejax.models.config import DecoderConfig
from moejax.models.decoder import init_decoder
from moejax.models.footprint import step_read_bytes
from moejax.offload.source import shapes_of
from moejax.offload.stage import OffloadConfig
from moejax.offload.store import to_host
from moejax.serving.engine import Engine, make_engine, split_experts

BAR = 1.15


class Arm:
    """An engine and its running session."""

    def __init__(self, engine: Engine, batch: int, preload: jax.Array | None):
        # Sequences that begin alike would want the same experts for ever.
        token = jnp.arange(batch, dtype=jnp.int32)
        self.engine = engine
        self.session = dataclasses.replace(engine.start(batch), token=token)
        if preload is not None:
            self.session = engine.preload(self.session, preload)
        self.tokens: list[jax.Array] = []
        self.fetches: list[jax.Array] = []
        self.lookups: list[jax.Array] = []

    def step(self) -> jax.Array:
        self.session, token, metrics = self.engine.step(self.session)
        self.tokens.append(token)
        self.fetches.append(metrics.demand_fetches.sum())
        self.lookups.append(metrics.lookups.sum())
        return token


def make_engines(cfg: DecoderConfig, capacity: int) -> tuple[dict[str, Engine], jax.Array]:
    """The two engines over one set of random weights, and all granules."""
    mesh = make_mesh()
    params = jax.jit(init_decoder, static_argnums=1)(jax.random.key(0), cfg)
    dense, experts = split_experts(params, cfg)
    total = cfg.num_moe_layers * cfg.moe.router.num_experts
    offload = OffloadConfig(num_slots=total)
    engines = {
        "resident": make_engine(dense, experts, cfg, mesh, capacity=capacity),
        "cached": make_engine(
            dense, to_host(experts, mesh), cfg, mesh, capacity=capacity, offload=offload
        ),
    }
    return engines, jnp.arange(total, dtype=jnp.int32)[None]


def compare(engines: dict[str, Engine], granules: jax.Array, batch: int, rounds: int) -> dict:
    """Times both arms at one batch size and proves that they did the same work."""
    arms = {
        name: Arm(engine, batch, granules if name == "cached" else None)
        for name, engine in engines.items()
    }
    seconds = interleave({name: arm.step for name, arm in arms.items()}, rounds=rounds)
    tokens = {name: np.stack([np.asarray(t) for t in arm.tokens]) for name, arm in arms.items()}
    fetched = int(sum(int(f) for f in arms["cached"].fetches))
    if fetched or not np.array_equal(tokens["resident"], tokens["cached"]):
        raise RuntimeError(f"the arms differ: {fetched} fetches with everything cached")
    pairs = zip(seconds["cached"], seconds["resident"], strict=True)
    return {
        "overhead": statistics.median(c / r for c, r in pairs),
        "overhead_of_medians": statistics.median(seconds["cached"])
        / statistics.median(seconds["resident"]),
        "arms": {name: summary(times) for name, times in seconds.items()},
        "experts_read": float(np.mean([int(one) for one in arms["resident"].lookups])),
    }


def main() -> None:
    cli.check_writable(cli.JSON.value)
    cfg = get_shape(SHAPE.value)
    batches = cli.read_counts(BATCH)
    capacity = ROUNDS.value + 8
    engines, granules = make_engines(cfg, capacity)
    bandwidth = stream_read_bytes_per_s()
    engine = engines["resident"]
    weights = engine.params, shapes_of(engine.experts)
    figures = {"overhead_all_cached": {}, "stream_read_gb_per_s": bandwidth / 1e9, "batch": {}}
    table = Table("batch", "resident ms", "cached ms", "cached / resident", "bound ms")
    for batch in batches:
        result = compare(engines, granules, batch, ROUNDS.value)
        bound = 1e3 * step_read_bytes(*weights, result["experts_read"]) / bandwidth
        figures["overhead_all_cached"][str(batch)] = result["overhead"]
        figures["batch"][str(batch)] = result | {"read_bound_ms": bound}
        resident, cached = result["arms"]["resident"], result["arms"]["cached"]
        table.add_row(
            str(batch),
            f"{resident['median_ms']:.2f} (min {resident['min_ms']:.2f})",
            f"{cached['median_ms']:.2f} (min {cached['min_ms']:.2f})",
            f"{result['overhead']:.3f} (must {BAR})",
            f"{bound:.2f}",
        )
    Console().print(table)
    cli.write_report("bench/offloaded_step", "time", figures | {"shape": SHAPE.value})


if __name__ == "__main__":
    cli.run(main)
