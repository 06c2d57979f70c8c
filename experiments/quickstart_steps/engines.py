"""The engines that step 4 of the quickstart compares: budgets, programs, and compiling them.

Axis letters:
    B  batch    S  prompt positions
"""

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from experiments import cli
from moejax.core.compat import cheap_cpu_options
from moejax.core.errors import check
from moejax.core.memory import nbytes
from moejax.data.text import Split
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.models.footprint import footprint
from moejax.offload.budget import parse_budget, solve_slots
from moejax.offload.stage import OffloadConfig
from moejax.offload.store import to_device
from moejax.predictors.residual import ResidualParams
from moejax.serving import prediction
from moejax.serving.config import DecodeConfig
from moejax.serving.engine import Engine, make_engine, split_experts

MODES = ("resident", "on_demand", "cache", "next_gate", "learned")


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
    dense: DecoderParams,
    host: GatedWeights,
    learned: ResidualParams,
    model: DecoderConfig,
    cfg: DecodeConfig,
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
        wants = footprint(
            model,
            dense,
            host,
            ranks=1,
            batch=max(cfg.batch_sizes),
            capacity=kv_capacity(cfg),
            prompt=cfg.prompt_bytes,
            lanes=lanes,
        )
        if mode == "learned":
            wants = dataclasses.replace(wants, predictor_bytes=nbytes(learned))
        num_slots = solve_slots(budget, wants, min_slots=model.num_moe_layers)
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
    for mode, offload in plan_modes(dense, host, learned, model, cfg).items():
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


def compile_all(
    engines: dict[str, Engine], heldout: Split, cfg: DecodeConfig, progress: Progress
) -> dict[int, dict[str, Engine]]:
    """The engines with compiled programs, by batch size.

    As many compile at once as there are cores.
    """
    jobs: dict[tuple[int, Any], Future] = {}
    with ThreadPoolExecutor(cli.cpu_cores()) as pool:

        def compile_soon(batch: int, name: str, program: Any, *arguments: Any) -> None:
            # Tracing holds the interpreter, compiling does not: the next is traced meanwhile.
            if (batch, program) not in jobs:
                lowered = program.lower(*arguments)
                jobs[batch, program] = pool.submit(lowered.compile, _options(name))

        for batch in cfg.batch_sizes:
            prompts = make_prompts(heldout, batch, cfg)
            for e in engines.values():
                session, programs = e.start(batch), e.programs
                start = e.params, e.experts
                compile_soon(batch, "prefill", programs.prefill, *start, session, *prompts)
                compile_soon(batch, "step", programs.step, *start, e.predictor, session)
        task = progress.add_task("compile", total=len(jobs))
        for job in as_completed(jobs.values()):
            job.result()
            progress.advance(task)
    compiled = {key: job.result() for key, job in jobs.items()}

    def ready(engine: Engine, batch: int) -> Engine:
        programs = engine.programs
        return dataclasses.replace(
            engine,
            programs=dataclasses.replace(
                programs,
                prefill=compiled[batch, programs.prefill],
                step=compiled[batch, programs.step],
            ),
        )

    return {b: {mode: ready(e, b) for mode, e in engines.items()} for b in cfg.batch_sizes}


def _options(program: str) -> dict[str, Any] | None:
    """XLA options of a program; why these, and what they save: `docs/log.md`."""
    if jax.default_backend() != "cpu":
        return None
    # A prompt runs once: not worth optimising at all.
    level = {"prefill": 0, "step": 1}[program]
    return cheap_cpu_options(level)
