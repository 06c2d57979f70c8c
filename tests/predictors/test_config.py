"""Wrong sizes are refused with their value."""

import pytest

from moejax.core.errors import InputError
from moejax.core.overlay import overlay
from moejax.predictors.config import FitConfig, PredictConfig


@pytest.mark.parametrize(
    "config, wrong, message",
    [
        (FitConfig, {"horizon_secs": 0.0}, "horizon_secs=0.0 must be positive"),
        (FitConfig, {"horizon_steps": 0}, "horizon_steps=0 must be at least 1"),
        (FitConfig, {"batch": 0}, "batch=0 must be at least 1"),
        (FitConfig, {"hidden": -1}, "hidden=-1 must be at least 1"),
        (FitConfig, {"learning_rate": -1.0}, "learning_rate=-1.0 must be positive"),
        (FitConfig, {"seed": -1}, "seed=-1 must be at least 0"),
        (PredictConfig, {"seed": -1}, "seed=-1 must be at least 0"),
        (PredictConfig, {"heldout_files": 0}, "heldout_files=0 must be at least 1"),
        (PredictConfig, {"fit_tokens": 100}, "fit_tokens=100 is less than one window=128"),
    ],
)
def test_wrong_sizes_are_refused(config, wrong, message):
    with pytest.raises(InputError, match=message):
        config(**wrong)


def test_every_knob_is_reachable():
    cfg = overlay(PredictConfig(), ["fit.horizon_steps=3", "fit_tokens=256", "window=64"])
    assert (cfg.fit.horizon_steps, cfg.fit_tokens, cfg.window) == (3, 256, 64)
