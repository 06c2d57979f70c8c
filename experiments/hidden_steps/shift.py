"""Online tuning where it matters: fitted to one domain, asked about another.

Axis letters:
    L  MoE layers    N  windows    S  tokens of a window    T  tokens of a step    K  experts
"""

from functools import partial
from typing import Any

import jax
import numpy as np

from moejax.predictors.llapor import LlaporParams, all_scores
from moejax.predictors.recording import Recording
from moejax.predictors.tuning import TuningConfig, init_tuning, missed, tune

TOKENS_AT_ONCE = 16


def stream(params: LlaporParams, recording: Recording, cfg: TuningConfig) -> dict[str, Any]:
    """Recall@k over a stream of all windows, as fitted and with tuning, and the steps it took.

    Every token is predicted before it is learned from. Recalls are means over target layers.
    """
    layers, *_, top_k = recording.topk_idx.shape
    hidden = recording.activations[:-1].reshape(layers - 1, -1, recording.activations.shape[-1])
    chosen = recording.topk_idx[1:].reshape(layers - 1, -1, top_k)
    follow = jax.jit(partial(tune, cfg=cfg))
    miss = jax.jit(lambda params, hidden, chosen: missed(all_scores(params, hidden), chosen))
    tuned, state = params, init_tuning(params, top_k=top_k, cfg=cfg)
    wrong: dict[str, list[np.ndarray]] = {"fixed": [], "tuned": []}
    steps = np.zeros(layers - 1, int)
    for first in range(0, hidden.shape[1] - TOKENS_AT_ONCE + 1, TOKENS_AT_ONCE):
        now = (hidden[:, first : first + TOKENS_AT_ONCE], chosen[:, first : first + TOKENS_AT_ONCE])
        wrong["fixed"].append(np.asarray(miss(params, *now)))
        wrong["tuned"].append(np.asarray(miss(tuned, *now)))
        tuned, state, moved = follow(tuned, state, *now)
        steps += np.asarray(moved)
    recall = {name: 1 - np.concatenate(each, 1) for name, each in wrong.items()}
    half = recall["fixed"].shape[1] // 2
    return {
        "tokens": recall["fixed"].shape[1],
        "steps_per_layer": steps.tolist(),
        **{name: float(value.mean()) for name, value in recall.items()},
        **{f"{name}_second_half": float(v[:, half:].mean()) for name, v in recall.items()},
    }
