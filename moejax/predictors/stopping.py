"""How long to fit a history predictor, chosen on sequences that it is not fitted on.

The sequences given are split once more; what is chosen never saw those that will judge it.
"""

import dataclasses

import jax
import numpy as np

from moejax.core.errors import check
from moejax.predictors import history
from moejax.predictors.config import FitConfig
from moejax.predictors.evaluate import mean_recall
from moejax.predictors.features import recorded_features, valid_tokens
from moejax.predictors.fit import Progress, fit_history
from moejax.predictors.recording import Recording, folds, take

PARTS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stopping:
    """The number of steps with the best recall, and the recall after every number tried."""

    steps: int
    recall: dict[int, float]


def choose_steps(
    recording: Recording,
    num_experts: int,
    vocab_size: int,
    cfg: FitConfig,
    *,
    every: int,
    horizons: int = 1,
    progress: Progress | None = None,
) -> Stopping:
    """Fits on four fifths of the sequences and asks for the others after every `every` steps.

    What counts is recall@k, a mean over target layers and then over horizons 1 .. `horizons`. The
    schedule is that of `cfg.horizon_steps`, whatever is chosen: pass `stop` to `fit_history`.
    """
    check(cfg.horizon_steps is not None, "steps are chosen for a horizon in steps, not in seconds")
    sequences = recording.topk_idx.shape[1]
    fit_on, watched = folds(sequences, min(PARTS, sequences), cfg.seed)[0]
    held_out = take(recording, watched)
    rows = valid_tokens(held_out.topk_idx, num_experts)
    ask = jax.jit(history.scores, static_argnames="horizon")
    recall: dict[int, float] = {}

    def watch(step: int, params: history.HistoryParams) -> None:
        if step % every and step != cfg.horizon_steps:
            return
        known = recorded_features(held_out, params.popularity, vocab_size=vocab_size, rows=rows)
        chosen = np.asarray(known.chosen)
        recall[step] = float(
            np.mean(
                [
                    mean_recall(np.asarray(ask(params, known, horizon=h)), chosen[h:])
                    for h in range(1, horizons + 1)
                ]
            )
        )

    fit_history(
        take(recording, fit_on),
        num_experts,
        vocab_size,
        cfg,
        horizons=horizons,
        progress=progress,
        watch=watch,
    )
    return Stopping(steps=max(recall, key=lambda step: recall[step]), recall=recall)
