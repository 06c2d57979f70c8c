"""Static descriptions of fitting and of the whole prediction experiment."""

import dataclasses

from moejax.core.errors import check, check_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long and how wide.

    Attributes:
        horizon_secs: fitting time, compilation excluded.
        horizon_steps: when given, counts instead of the clock: the result is reproducible.
        batch: tokens per step.
        hidden: hidden units of the nets.
        embedding: width of the vectors that history makes of tokens and choices.
        drop_choices: fraction of the choices that the history predictor is not shown, at random.
        drop_hidden: fraction of its hidden units that are silent, at random.
    """

    horizon_secs: float = 8.0
    horizon_steps: int | None = None
    batch: int = 512
    learning_rate: float = 1.5e-2
    weight_decay: float = 0.01
    hidden: int = 256
    embedding: int = 128
    drop_choices: float = 0.2
    drop_hidden: float = 0.1
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)
        for name in ("drop_choices", "drop_hidden"):
            check(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} is not in [0, 1)")
        check(self.horizon_secs > 0, f"horizon_secs={self.horizon_secs} must be positive")
        check(
            self.horizon_steps is None or self.horizon_steps >= 1,
            f"horizon_steps={self.horizon_steps} must be at least 1",
        )
        for name in ("batch", "hidden", "embedding"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What is recorded, and how predictors are fitted to it.

    Attributes:
        window: positions of a recorded sequence; a multiple of them makes up the counts below.
        fit_tokens: tokens of training files to fit on.
        heldout_files: held-out files to evaluate on, at most.
        heldout_tokens: leading tokens of each of them, at most.
        record_batch: windows in one forward pass.
        coverage_batch: sequences decoded side by side for token coverage.
    """

    fit: FitConfig = FitConfig()
    window: int = 128
    fit_tokens: int = 65536
    heldout_files: int = 10
    heldout_tokens: int = 2048
    record_batch: int = 16
    coverage_batch: int = 16
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)
        for name in ("window", "heldout_files", "record_batch", "coverage_batch"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("fit_tokens", "heldout_tokens"):
            tokens = getattr(self, name)
            check(tokens >= self.window, f"{name}={tokens} is less than one window={self.window}")
