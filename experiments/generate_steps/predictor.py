"""What `--predictor` names: the model's own routers, or a predictor that was fitted to it."""

import pathlib
from typing import Any

import jax

from moejax.core.errors import check
from moejax.core.memory import nbytes
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams, init_decoder
from moejax.models.experts import stacking_copies
from moejax.predictors.history import HistoryParams
from moejax.predictors.llapor import LlaporParams
from moejax.predictors.path import PathParams
from moejax.predictors.residual import ResidualParams
from moejax.predictors.store import Predictor, describe, restore_predictor
from moejax.serving import prediction
from moejax.serving.prediction import Prediction

FITTED = {
    "learned": ResidualParams,
    "history": HistoryParams,
    "llapor": LlaporParams,
    "path": PathParams,
}
NAMES = ("none", "next_gate", *FITTED)


def check_flags(name: str, folder: str | None) -> None:
    """A fitted predictor wants its folder, the others have none."""
    check(
        (name in FITTED) == (folder is not None),
        f"--predictor={name} and --predictor_dir={folder}: "
        f"{', '.join(FITTED)} want a folder, the others none",
    )


def read_fitted(name: str, folder: str | None, cfg: DecoderConfig) -> Predictor | None:
    """The predictor in `folder`, refused when it is of another kind or model; None for none.

    Reads no weights of the model, so that a wrong folder is told at once.
    """
    zero = cfg.moe.zero_experts
    check(
        name == "none" or zero == 0,
        f"--predictor={name} does not serve a model with {zero} experts without weights",
    )
    if folder is None:
        return None
    learned = restore_predictor(pathlib.Path(folder))
    check(
        isinstance(learned, FITTED[name]),
        f"--predictor={name}: {folder} holds a predictor of kind {describe(learned)[0]}",
    )
    prediction.check_fits(learned, cfg)
    return learned


def make_prediction(
    name: str, learned: Predictor | None, params: DecoderParams, cfg: DecoderConfig
) -> Prediction | None:
    """What the engine prefetches by; `learned` as `read_fitted` gave it."""
    if learned is not None:
        return prediction.fitted(learned, params, cfg)
    return prediction.next_gate(params, cfg) if name == "next_gate" else None


def device_bytes(name: str, learned: Predictor | None, cfg: DecoderConfig, batch: int) -> int:
    """What the prediction keeps on the device beside the model, for `batch` sequences.

    That is a fitted predictor's weights, the history of the sequences, and the stacked routers
    where they are not the model's own arrays.
    """

    def kept(key: jax.Array, learned: Predictor | None) -> tuple[Any, Any]:
        made = make_prediction(name, learned, init_decoder(key, cfg), cfg)
        return (made.params, made.init(made.params, batch)) if made else (None, None)

    params, history = jax.eval_shape(kept, jax.random.key(0), learned)
    return nbytes(history) + nbytes(params if stacking_copies(cfg) else learned)
