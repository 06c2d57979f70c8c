"""Quickstart step 4: decode under a device budget, five ways, and compare.

    resident     every expert on the device
    on_demand    one staging slot: every wanted expert is fetched, nothing is kept
    cache        slots for the budget's share of the experts
    next_gate    the cache, and the next layer's own router says what to fetch ahead
    learned      the cache, and a learned predictor says it

All five run the same tokens through the same model; they are stepped in turns, so that a noisy
moment of the machine hits all of them.
"""

import dataclasses
import time

import jax
import numpy as np
from rich.progress import Progress
from rich.table import Table

from experiments.measure import host_fetch_bytes_per_s, stream_read_bytes_per_s
from experiments.quickstart_steps.engines import make_prompts
from moejax.core.memory import nbytes
from moejax.costmodel.limits import limit_report
from moejax.data.text import Split
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.offload.source import shapes_of
from moejax.offload.store import expert_bytes
from moejax.serving.config import DecodeConfig
from moejax.serving.engine import Engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bandwidths:
    """What the machine can do, measured in this run, bytes per second."""

    device_read: float
    host_fetch: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModeResult:
    """One way of decoding at one batch size; per-token figures are per generated token."""

    tokens: np.ndarray  # int32 [n, B]
    tokens_per_s: float
    hit_rate: float
    bytes_per_token: float
    wasted_bytes_per_token: float
    fraction_of_bound: float
    limited_by: str
    slots: int

    def figures(self) -> dict[str, float | str]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "tokens"}


def measure_bandwidths(host: GatedWeights) -> Bandwidths:
    """Streaming reads of device memory, and compiled fetches from the host store."""
    return Bandwidths(
        device_read=stream_read_bytes_per_s(), host_fetch=host_fetch_bytes_per_s(host)
    )


class _Run:
    """A mode that is being stepped."""

    def __init__(self, engine: Engine, tokens: jax.Array, mask: jax.Array):
        self.engine = engine
        session = engine.start(tokens.shape[0])
        self.session, token, _ = engine.prefill(session, tokens, mask)
        self.tokens, self.metrics, self.seconds = [token], [], []

    def step(self) -> None:
        begin = time.perf_counter()
        self.session, token, metrics = self.engine.step(self.session)
        jax.block_until_ready(token)
        self.seconds.append(time.perf_counter() - begin)
        self.tokens.append(token)
        self.metrics.append(metrics)


def compare(
    engines: dict[str, Engine],
    slots: dict[str, int],
    heldout: Split,
    bandwidths: Bandwidths,
    cfg: DecodeConfig,
    *,
    batch: int,
    new_tokens: int,
    progress: Progress,
) -> dict[str, ModeResult]:
    """Decodes `new_tokens` tokens of `batch` sequences in every mode, in turns."""
    tokens, mask = make_prompts(heldout, batch, cfg)
    task = progress.add_task(f"decode, batch {batch}", total=len(engines) + new_tokens)
    runs = {}
    for mode, engine in engines.items():
        runs[mode] = _Run(engine, tokens, mask)
        progress.advance(task)
    for _ in range(new_tokens):
        for run in runs.values():
            run.step()
        progress.advance(task)
    return {mode: _summarize(run, slots[mode], bandwidths) for mode, run in runs.items()}


def _summarize(run: _Run, slots: int, bandwidths: Bandwidths) -> ModeResult:
    # The first step warms up; the median of the others is not moved by a hiccup.
    seconds = float(np.median(run.seconds[1:]))
    totals = jax.tree.map(lambda *leaves: np.stack(leaves).sum(), *run.metrics)
    steps, batch = len(run.metrics), len(run.tokens[0])
    expert = expert_bytes(shapes_of(run.engine.experts))
    moved = (totals.demand_fetches + totals.prefetches) * expert
    read = nbytes(run.engine.params) + totals.lookups / steps * expert
    limit = limit_report(
        bytes_per_step=float(moved / steps),
        link_bytes_per_s=bandwidths.host_fetch,
        device_s=float(read / bandwidths.device_read),
        measured_s=seconds,
    )
    return ModeResult(
        tokens=np.stack(run.tokens),
        tokens_per_s=batch / seconds,
        hit_rate=float(totals.hits / totals.lookups),
        bytes_per_token=float(moved / steps / batch),
        wasted_bytes_per_token=float(totals.prefetches_wasted * expert / steps / batch),
        fraction_of_bound=limit.achieved_fraction or 0.0,
        limited_by=limit.limit,
        slots=slots,
    )


def check_identical(results: dict[str, ModeResult]) -> bool:
    """True when every mode decoded the resident mode's tokens."""
    first = results["resident"].tokens
    return all(np.array_equal(first, result.tokens) for result in results.values())


def sample_text(engine: Engine, heldout: Split, cfg: DecodeConfig) -> tuple[str, str]:
    """A prompt from a held-out file and what the model writes after it.

    `engine` is compiled for the smallest batch.
    """
    batch = min(cfg.batch_sizes)
    tokens, mask = make_prompts(heldout, batch, cfg)
    session = engine.start(batch, seed=cfg.seed, temperature=cfg.temperature)
    session, token, _ = engine.prefill(session, tokens, mask)
    written = [token]
    for _ in range(cfg.sample_bytes - 1):
        session, token, _ = engine.step(session)
        written.append(token)
    text = bytes(int(t[0]) for t in written).decode("utf-8", errors="replace")
    return bytes(np.asarray(tokens[0], np.uint8)).decode("utf-8", errors="replace"), text


def table_of(batch: int, results: dict[str, ModeResult]) -> Table:
    """The comparison as the console shows it."""
    table = Table(
        "mode", "slots", "tokens/s", "hit rate", "KiB moved/token", "KiB wasted/token",
        "of bound", title=f"decode, batch {batch}",
    )  # fmt: skip
    for mode, r in results.items():
        table.add_row(
            mode,
            str(r.slots),
            f"{r.tokens_per_s:.0f}",
            f"{r.hit_rate:.1%}",
            f"{r.bytes_per_token / 1024:.0f}",
            f"{r.wasted_bytes_per_token / 1024:.0f}",
            f"{r.fraction_of_bound:.1%} ({r.limited_by})",
        )
    return table
