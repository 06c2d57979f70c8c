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
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress
from rich.table import Table

from experiments.measure import host_fetch_bytes_per_s, stream_read_bytes_per_s
from moejax.core.errors import check
from moejax.core.memory import nbytes
from moejax.costmodel.limits import limit_report
from moejax.data.text import Split
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.offload.budget import Footprint, parse_budget, solve_slots
from moejax.offload.stage import OffloadConfig
from moejax.offload.store import expert_bytes, to_device
from moejax.predictors.residual import ResidualParams
from moejax.serving import prediction
from moejax.serving.config import DecodeConfig
from moejax.serving.engine import Engine, make_engine, split_experts

MODES = ("resident", "on_demand", "cache", "next_gate", "learned")


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


def make_prompts(heldout: Split, batch: int, cfg: DecodeConfig) -> tuple[jax.Array, jax.Array]:
    """Right-padded prompts int32 [B, S] from the starts of held-out files, and their mask."""
    rng = np.random.default_rng(cfg.seed)
    spans = [span for span in heldout.spans if span.stop - span.start > cfg.prompt_bytes]
    check(len(spans) > 0, f"no held-out file is longer than prompt_bytes={cfg.prompt_bytes}")
    length = cfg.prompt_bytes
    tokens, mask = np.zeros((batch, length), np.int32), np.zeros((batch, length), bool)
    for row in range(batch):
        span = spans[rng.integers(len(spans))]
        n = length if row == 0 else int(rng.integers(length // 2, length + 1))
        start = int(rng.integers(span.start, span.stop - n))
        tokens[row, :n], mask[row, :n] = heldout.data[start : start + n], True
    return jnp.asarray(tokens), jnp.asarray(mask)


def kv_capacity(cfg: DecodeConfig) -> int:
    """Positions that a session holds: the longest prompt and all that follows it."""
    return cfg.prompt_bytes + max(*cfg.new_tokens, cfg.sample_bytes) + 1


def plan_modes(
    dense: DecoderParams, host: GatedWeights, model: DecoderConfig, cfg: DecodeConfig
) -> dict[str, OffloadConfig | None]:
    """What the budget gives to every mode, None for all experts; the weights may be abstract.

    Raises `InputError` that says the smallest budget when a mode does not fit.
    """
    budget = parse_budget(cfg.device_budget)
    plans: dict[str, OffloadConfig | None] = {
        "resident": None,
        "on_demand": OffloadConfig(num_slots=1, quota="shared"),
    }
    for mode in reversed(MODES[2:]):  # the one that wants most refuses first
        lanes = 0 if mode == "cache" else cfg.prefetch_lanes
        footprint = footprint_of(dense, host, model, cfg, lanes)
        num_slots = solve_slots(budget, footprint, min_slots=model.num_moe_layers)
        plans[mode] = OffloadConfig(num_slots=num_slots, policy=cfg.policy, prefetch_lanes=lanes)
    return {mode: plans[mode] for mode in MODES}


def make_engines(
    params: DecoderParams,
    model: DecoderConfig,
    learned: ResidualParams,
    mesh: jax.sharding.Mesh,
    cfg: DecodeConfig,
) -> tuple[dict[str, Engine], dict[str, int]]:
    """An engine per mode, over one host store, and the slots that the budget gave each."""
    dense, host = split_experts(params, model)
    predictions = {
        "next_gate": prediction.next_gate(dense, model),
        "learned": prediction.residual(learned, dense, model),
    }
    engines, slots = {}, {}
    for mode, offload in plan_modes(dense, host, model, cfg).items():
        everything = model.num_moe_layers * model.moe.router.num_experts
        slots[mode] = offload.num_slots if offload else everything
        engines[mode] = make_engine(
            dense,
            host if offload else to_device(host, mesh),
            model,
            mesh,
            capacity=kv_capacity(cfg),
            offload=offload,
            prediction=predictions.get(mode),
        )
    return engines, slots


def footprint_of(
    dense: DecoderParams,
    host: GatedWeights,
    model: DecoderConfig,
    cfg: DecodeConfig,
    lanes: int,
) -> Footprint:
    """Device bytes besides slots, at the largest batch of the comparison."""
    batch, attention = max(cfg.batch_sizes), model.attention
    width = attention.num_kv_heads * attention.head_dim
    item = model.jnp_dtype.itemsize
    assignments = batch * cfg.prompt_bytes * model.moe.router.top_k
    return Footprint(
        dense_bytes=nbytes(dense),
        kv_bytes=2 * model.num_layers * batch * kv_capacity(cfg) * width * item,
        # Sorted rows in and out of the experts, and the logits.
        workspace_bytes=4 * assignments * model.d_model * 4
        + batch * cfg.prompt_bytes * model.vocab_size * 4,
        expert_bytes=expert_bytes(host),
        num_layers=model.num_moe_layers,
        num_experts=model.moe.router.num_experts,
        landing_experts=lanes + 1,
    )


def measure_bandwidths(host: GatedWeights) -> Bandwidths:
    """Streaming reads of device memory, and compiled fetches from the host store."""
    return Bandwidths(
        device_read=stream_read_bytes_per_s(), host_fetch=host_fetch_bytes_per_s(host)
    )


def compile_all(engines: dict[str, Engine], heldout: Split, cfg: DecodeConfig, progress: Progress):
    """Compiles every program of every mode for every batch size, as many at once as cores.

    A compilation keeps one core busy. Calls find the programs compiled.
    """
    lowered = []
    for batch in cfg.batch_sizes:
        tokens, mask = make_prompts(heldout, batch, cfg)
        prefills: dict[Any, tuple] = {}
        for e in engines.values():
            session = e.start(batch)
            prefills[e.programs.prefill] = (e.params, e.experts, session, tokens, mask)
            lowered.append(e.programs.step.lower(e.params, e.experts, e.predictor, session))
        lowered += [prefill.lower(*arguments) for prefill, arguments in prefills.items()]
    task = progress.add_task("compile", total=len(lowered))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda program: program.compile(), lowered):
            progress.advance(task)


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
    expert = expert_bytes(run.engine.experts)
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
    """A prompt from a held-out file and what the model writes after it."""
    tokens, mask = make_prompts(heldout, 1, cfg)
    session = engine.start(1, seed=cfg.seed, temperature=cfg.temperature)
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
