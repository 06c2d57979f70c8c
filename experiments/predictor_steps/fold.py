"""One fold: baselines counted, the history predictor fitted, all judged on what was held out.

Axis letters:
    L  MoE layers    B  sequences    S  positions    E  experts    T  tokens
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import cli
from moejax.core.errors import InputError, check
from moejax.data.routing_trace import RoutingTrace
from moejax.predictors import baselines, history
from moejax.predictors.config import FitConfig
from moejax.predictors.evaluate import Evaluation, evaluate
from moejax.predictors.features import recorded_features, valid_tokens
from moejax.predictors.fit import fit_history
from moejax.predictors.history import HistoryParams
from moejax.predictors.recording import Recording, from_trace, take
from moejax.predictors.stopping import choose_steps

LABELS = {
    "popularity": "popularity",
    "previous_token": "previous token",
    "bigram": "bigram",
    "history": "history",
}
BASELINES = {
    "popularity": baselines.popular_scores,
    "previous_token": baselines.previous_token_scores,
    "bigram": baselines.bigram_scores,
}
TRIES = 6  # lengths of a fit that are compared
Update = Callable[[float, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
    """What a fold came to; lists have one entry per target layer."""

    tokens: int  # held out
    steps: int
    secs: float  # choosing and fitting, compilation included
    tried: dict[str, float]  # recall@k inside the fitting sequences, by steps
    figures: dict[str, dict[str, Any]]  # predictor -> horizon -> fields of `Evaluation`


def run_fold(
    trace: RoutingTrace,
    split: tuple[np.ndarray, np.ndarray],
    cfg: FitConfig,
    horizons: int,
    kept: pathlib.Path | None,
    update: Update,
) -> Fold:
    """Fits on the sequences `split[0]`, judges on `split[1]`; read from `kept` if done before."""
    name = _fingerprint(trace, split, cfg, horizons)
    if kept is not None and kept.exists():
        return read_fold(kept, name)
    recording = from_trace(trace)
    train, held_out = (take(recording, part) for part in split)
    fold = _fit_and_judge(trace, train, held_out, cfg, horizons, update)
    if kept is not None:
        cli.write_text(kept, json.dumps({"of": name, "fold": dataclasses.asdict(fold)}) + "\n")
    return fold


def read_fold(kept: pathlib.Path, name: str) -> Fold:
    """A fold that was done before; `InputError` when it is of another run."""
    try:
        record = json.loads(kept.read_text())
        have, fold = record["of"], Fold(**record["fold"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{kept}: not a fold that this program kept ({error})") from error
    check(have == name, f"{kept}: of another trace, split or --set; give another --workdir")
    return fold


def _fit_and_judge(
    trace: RoutingTrace,
    train: Recording,
    held_out: Recording,
    cfg: FitConfig,
    horizons: int,
    update: Update,
) -> Fold:
    """`update` is told fractions: fitting takes nearly all of the time."""
    experts, steps = trace.num_experts, cfg.horizon_steps
    if steps is None:
        raise InputError("--set horizon_steps=None: folds are fitted for steps, not for seconds")
    begin = time.perf_counter()

    def tell(of: int, what: str):
        return lambda fraction, step, loss: update(
            (of + fraction) / 2, f"{what}: step {step}  loss {loss:.1f}"
        )

    stopping = choose_steps(
        train, experts, 1, cfg,
        every=max(1, steps // TRIES), horizons=horizons, progress=tell(0, "how long"),
    )  # fmt: skip
    params, _ = fit_history(
        train, experts, 1, cfg,
        horizons=horizons, stop=stopping.steps, progress=tell(1, "fitting"),
    )  # fmt: skip
    secs = time.perf_counter() - begin
    figures: dict[str, dict[str, Any]] = {label: {} for label in LABELS}
    for horizon in range(1, horizons + 1):
        size = trace.expert_bytes[horizon:]
        for label, ask in BASELINES.items():
            scores = ask(train, held_out, experts, horizon=horizon)
            judged = evaluate(scores, held_out, expert_bytes=size, horizon=horizon)
            figures[label][str(horizon)] = _as_json(judged)
        scores = history_scores(params, held_out, horizon)
        judged = evaluate(scores, held_out, expert_bytes=size, horizon=horizon)
        figures["history"][str(horizon)] = _as_json(judged)
    return Fold(
        tokens=len(valid_tokens(held_out.topk_idx, experts)),
        steps=stopping.steps,
        secs=secs,
        tried={str(step): recall for step, recall in stopping.recall.items()},
        figures=figures,
    )


def history_scores(params: HistoryParams, held_out: Recording, horizon: int) -> np.ndarray:
    """float32 [L - horizon, B, S, E], 0 for padding, which counts nowhere."""
    shape, experts = held_out.topk_idx.shape, params.popularity.shape[1]
    rows = valid_tokens(held_out.topk_idx, experts)
    known = recorded_features(held_out, params.popularity, vocab_size=1, rows=rows)
    scores = np.zeros((shape[0] - horizon, shape[1] * shape[2], experts), np.float32)
    scores[:, rows] = jax.jit(history.scores, static_argnames="horizon")(
        params, known, horizon=horizon
    )
    return scores.reshape(len(scores), shape[1], shape[2], experts)


def _as_json(judged: Evaluation) -> dict[str, Any]:
    """The fields of an `Evaluation` with text for keys, as JSON will have them."""
    return {
        field: {str(m): row for m, row in value.items()} if isinstance(value, dict) else value
        for field, value in dataclasses.asdict(judged).items()
    }


def _fingerprint(trace: RoutingTrace, split: Any, cfg: FitConfig, horizons: int) -> str:
    """Of all that a fold depends on."""
    settings = repr((cfg, horizons, trace.num_experts, [part.tolist() for part in split]))
    digest = hashlib.sha256(settings.encode())
    digest.update(np.ascontiguousarray(trace.topk_idx).tobytes())
    return digest.hexdigest()[:16]
