"""Decoding with experts on disk: page cache and cold files against pinned host memory.

    python -m experiments.bench.disk_tier --experts_folder=workdir/experts --json=disk.json

One compiled step per token of random weights, the same budget and the same random tokens for all
(what random weights decode repeats itself, and would soon be cached):

    host         experts in pinned host memory
    cached       on disk, the page cache holds the files
    cold         on disk, and no file is in the page cache when a step begins
    cold_ahead   the same; what a layer's own router predicts one layer ahead is read ahead

The folder is made, with two copies of the experts, and stays. Ratios of medians, arms in turn.
"""

import dataclasses
import mmap
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from configs.shapes import get_shape
from experiments import cli
from experiments.bench.shape_flags import BATCH, BUDGET, SHAPE
from experiments.bench.timing import ROUNDS, summary
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.interop.hf.load import Imported
from moejax.interop.on_disk import keep_on_disk
from moejax.models.config import DecoderConfig
from moejax.models.decoder import init_decoder
from moejax.models.footprint import plan_offload
from moejax.offload.budget import parse_budget
from moejax.offload.disk import DiskExperts
from moejax.offload.store import expert_bytes, to_host
from moejax.serving.engine import Engine, make_engine, split_experts
from moejax.serving.prediction import next_gate

FOLDER = flags.DEFINE_string("experts_folder", None, "on the disk to be measured")


class Arm:
    """An engine and its running session; `before` is called before a step and not timed."""

    def __init__(self, engine: Engine, batch: int, before: Callable[[], None] | None = None):
        self.engine, self.before = engine, before
        self.session, self.vocab = engine.start(batch), engine.cfg.vocab_size
        self.seconds: list[float] = []
        self.tokens: list[np.ndarray] = []
        self.fetched: list[int] = []

    def step(self) -> None:
        rng = np.random.default_rng(len(self.tokens))
        token = rng.integers(0, self.vocab, self.session.token.shape[0])
        self.session = dataclasses.replace(self.session, token=jnp.asarray(token, jnp.int32))
        if self.before:
            self.before()
        begin = time.perf_counter()
        self.session, token, metrics = jax.block_until_ready(self.engine.step(self.session))
        self.seconds.append(time.perf_counter() - begin)
        self.tokens.append(np.asarray(token))
        self.fetched.append(int(metrics.demand_fetches.sum()))


def forget(disk: DiskExperts) -> None:
    """Puts all files of `disk` out of the page cache."""
    for layer in disk.files:
        layer.mapped.madvise(mmap.MADV_DONTNEED)  # what is mapped stays
        os.fdatasync(layer.file.fileno())
        os.posix_fadvise(layer.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_arms(cfg: DecoderConfig, folder: pathlib.Path, batch: int) -> dict[str, Arm]:
    """All arms over one set of random weights, experts written where they are missing."""
    mesh, capacity = make_mesh(), ROUNDS.value + 8
    params = jax.jit(init_decoder, static_argnums=1)(jax.random.key(0), cfg)
    dense, experts = split_experts(params, cfg)
    budget = parse_budget(BUDGET.value)
    check(budget is not None, f"--device_budget={BUDGET.value} leaves nothing on disk")
    offload = plan_offload(budget, cfg, dense, experts, mesh, batch=batch, capacity=capacity)
    model = Imported(
        cfg=cfg, params=dense, experts=experts, hf_config={}, stored_dtypes={}, context=0
    )
    warm, cold = (keep_on_disk(model, folder / name) for name in ("warm", "cold"))
    host = to_host(experts, mesh)

    def engine(store: Any, prediction: Any = None) -> Engine:
        return make_engine(
            dense, store, cfg, mesh, capacity=capacity, offload=offload, prediction=prediction
        )

    ahead = next_gate(dense, cfg)
    return {
        "host": Arm(engine(host), batch),
        "cached": Arm(engine(warm), batch),
        "cold": Arm(engine(cold), batch, lambda: forget(cold)),
        "cold_ahead": Arm(engine(cold, ahead), batch, lambda: forget(cold)),
    }


def compare(arms: dict[str, Arm], expert: int) -> dict[str, Any]:
    """Steps all arms in turn and proves that they decode the same."""
    for _ in range(ROUNDS.value + 2):
        for arm in arms.values():
            arm.step()
    first = arms["host"]
    for name, arm in arms.items():
        if not np.array_equal(arm.tokens, first.tokens) or arm.fetched != first.fetched:
            raise RuntimeError(f"{name} decodes other tokens than host")
    seconds = {name: arm.seconds[2:] for name, arm in arms.items()}
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "over_host": {name: each / medians["host"] for name, each in medians.items()},
        "fetched_mb_per_step": np.mean(first.fetched[2:]) * expert / 1e6,
        "arms": {name: summary(each) for name, each in seconds.items()},
    }


def main() -> None:
    check(bool(FOLDER.value), "--experts_folder names a folder on the disk to be measured")
    cli.check_writable(cli.JSON.value)
    cfg, results = get_shape(SHAPE.value), {}
    check(len(BATCH.value) > 0, "--batch= names no batch size")
    table = Table("batch", "MB fetched", "host ms", "cached", "cold", "cold, read ahead")
    for text in BATCH.value:
        check(text.isdecimal() and int(text) > 0, f"--batch {text!r} is not a positive integer")
        arms = make_arms(cfg, pathlib.Path(str(FOLDER.value)), int(text))
        store: Any = arms["host"].engine.experts
        result = results[text] = compare(arms, expert_bytes(store))
        over = [f"{result['over_host'][name]:.2f} x" for name in arms if name != "host"]
        host = f"{result['arms']['host']['median_ms']:.1f}"
        table.add_row(text, f"{result['fetched_mb_per_step']:.0f}", host, *over)
    Console().print(table)
    cli.write_report("bench/disk_tier", "time", {"shape": SHAPE.value, "batch": results})


if __name__ == "__main__":
    cli.run(main)
