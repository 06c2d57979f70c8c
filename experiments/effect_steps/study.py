"""The parts of `experiments/predictor_effect.py` in order: what is read, replayed and decoded."""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.progress import track

from experiments.effect_steps import decode, replay
from experiments.hidden_steps.predict import HORIZONS
from moejax.core.errors import check
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.predictors.store import Predictor, restore_predictor
from moejax.serving import prediction

# Those that the decoder can ask, or anybody who counts; not what reads a layer's own attention.
SIMULATED = ("previous_token", "token_table", "path", "history", "next_gate", "llapor", "residual")
FITTED = ("llapor", "residual", "history", "path", "pre_attention")
_PROMPT = 32


def read_fitted(folder: pathlib.Path) -> dict[str, Predictor]:
    """All that `hidden_predictors` left there; `InputError` that names what is missing."""
    for name in FITTED:
        there = (folder / name).exists()
        check(there, f"{folder} has no {name}; run experiments.hidden_predictors there first")
    return {name: restore_predictor(folder / name) for name in FITTED}


def simulate_all(
    topk_idx: np.ndarray,
    scores: Mapping[str, np.ndarray],
    machines: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    *,
    num_experts: int,
    fraction: float,
    seed: int,
) -> dict[str, Any]:
    """Figures by case: a machine, a context and a batch size.

    `topk_idx` is int32 [L, N, S, K], of windows of held-out text, `scores` [L - h, N, S, E] by
    predictor, h being its horizon.
    """
    ahead = {name: scores[name][1 - HORIZONS[name] :] for name in SIMULATED}
    steps = {
        batch: replay.make_steps(
            topk_idx, ahead, batch, min(512, max(128, 2048 // batch)),
            num_experts=num_experts, sizes=replay.QWEN3, seed=seed,
        )
        for batch in batches
    }  # fmt: skip
    cases = [(m, c, b) for m in machines for c in contexts for b in batches]
    silent = not sys.stdout.isatty()
    return {
        f"{machine} {context} B={batch}": replay.replay(
            steps[batch], machine, sizes=replay.QWEN3, context=context, fraction=fraction
        )
        for machine, context, batch in track(cases, "simulating", disable=silent, transient=True)
    }


def measure_all(
    params: DecoderParams,
    model: DecoderConfig,
    fitted: Mapping[str, Predictor],
    windows: np.ndarray,
    batches: Sequence[int],
    *,
    fraction: float,
    lanes: int,
    steps: int,
) -> dict[str, Any]:
    """Figures by batch size; sequences begin with windows int32 [N, S] spread over the domains."""
    ways = {"next_gate": prediction.next_gate(params, model)}
    for name in SIMULATED:
        if name in fitted:
            ways[name] = prediction.fitted(fitted[name], params, model)
    found = {}
    for batch in batches:
        check(batch <= len(windows), f"batch={batch} of {len(windows)} held-out windows")
        rows = np.linspace(0, len(windows) - 1, batch).astype(int)
        shared = decode.model_of(params, model, windows[rows, :_PROMPT], steps)
        found[str(batch)] = decode.measure(
            shared, ways, fraction=fraction, lanes=lanes, steps=steps
        )
    return found
