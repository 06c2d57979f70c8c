"""Decoding: compile, prefill, step after step, and what that cost.

Axis letters:
    B  batch    S  prompt positions
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measure import fetch_bytes_per_s, stream_read_bytes_per_s
from moejax.costmodel.limits import limit_report
from moejax.models.footprint import step_read_bytes
from moejax.offload.precision import TwoPrecisions
from moejax.offload.source import moved_bytes, shapes_of
from moejax.serving.engine import Engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """Tokens of every sequence, cut behind its stop token, and the times of the run."""

    tokens: list[list[int]]
    ttft_s: float
    step_s: list[float]
    metrics: Any  # summed over layers and steps; None when the prompt gave all tokens


def compiled(engine: Engine, tokens: jax.Array, mask: jax.Array) -> Engine:
    """The engine with its programs compiled for these prompts."""
    session, programs = engine.start(tokens.shape[0]), engine.programs
    weights = engine.params, engine.experts
    prefill = programs.prefill.lower(*weights, session, tokens, mask).compile()
    step = programs.step.lower(*weights, engine.predictor, session).compile()
    return dataclasses.replace(
        engine, programs=dataclasses.replace(programs, prefill=prefill, step=step)
    )


def generate(
    engine: Engine,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    max_new_tokens: int,
    stop: frozenset[int],
    seed: int,
    temperature: float,
    top_p: float,
    show: Callable[[list[list[int]]], None],
) -> Generated:
    """Decodes until every sequence has stopped; `show` gets the tokens after every step."""
    session = engine.start(tokens.shape[0], seed=seed, temperature=temperature, top_p=top_p)
    begin = time.perf_counter()
    session, token, _ = engine.prefill(session, tokens, mask)
    out, done = [[] for _ in range(len(tokens))], [False] * len(tokens)
    step_s, counts = [], []
    _append(out, done, np.asarray(token), stop)
    ttft_s = time.perf_counter() - begin
    show(out)
    while len(step_s) + 1 < max_new_tokens and not all(done):
        begin = time.perf_counter()
        session, token, metrics = engine.step(session)
        _append(out, done, np.asarray(token), stop)
        step_s.append(time.perf_counter() - begin)
        counts.append(metrics)
        show(out)
    total = None
    if counts:
        total = jax.tree.map(lambda *leaves: np.stack(leaves).sum(), *counts)
    return Generated(tokens=out, ttft_s=ttft_s, step_s=step_s, metrics=total)


def _append(out: list[list[int]], done: list[bool], token: np.ndarray, stop: frozenset[int]):
    for row, new in enumerate(token.tolist()):
        if not done[row]:
            out[row].append(new)
            done[row] = new in stop


def figures(engine: Engine, result: Generated) -> dict[str, Any]:
    """What the run was worth; times of a step are medians, its bound is measured here."""
    report: dict[str, Any] = {"ttft_s": result.ttft_s, "tokens": result.tokens}
    if result.metrics is None:
        return report
    steps, batch = len(result.step_s), len(result.tokens)
    seconds, total, experts = float(np.median(result.step_s)), result.metrics, engine.experts
    fetches, low = float(total.demand_fetches + total.prefetches), float(total.low_fetches)
    moved = moved_bytes(experts, fetches=fetches, low_fetches=low) / steps
    read = step_read_bytes(engine.params, shapes_of(experts), float(total.lookups) / steps)
    limit = limit_report(
        bytes_per_step=moved,
        link_bytes_per_s=fetch_bytes_per_s(experts) if moved else 1.0,
        device_s=read / stream_read_bytes_per_s(),
        measured_s=seconds,
    )
    if isinstance(experts, TwoPrecisions):
        report |= {"demand_fetches": int(total.demand_fetches), "low_fetches": int(low)}
    return report | {
        "tokens_per_s": batch / seconds,
        "hit_rate": float(total.hits / total.lookups),
        "bytes_per_token": moved / batch,
        "fraction_of_bound": limit.achieved_fraction,
        "limited_by": limit.limit,
    }


def as_arrays(tokens: list[list[int]], mask: list[list[bool]]) -> tuple[jax.Array, jax.Array]:
    """int32 [B, S] and bool [B, S]."""
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)
