"""Settings of `experiments/hidden_predictors.py`: what is recorded, and how predictors are fitted.

python -m experiments.hidden_predictors --workdir=workdir/second_model --set fit.horizon_steps=200
"""

import dataclasses

from moejax.core.errors import check, check_seed
from moejax.predictors.config import FitConfig
from moejax.predictors.llapor import LlaporConfig
from moejax.predictors.tuning import TuningConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenConfig:
    """Everything that `--set` reaches.

    Attributes:
        window: tokens of a recorded sequence.
        fit_tokens, heldout_tokens: recorded tokens of each domain, of training files and of others.
        score_tokens: held-out tokens of each domain on which the model is compared with n-grams.
        record_batch: windows in one forward pass.
        llapor: its bytes are what history and the learned look-ahead get as well.
        context: tokens that the routing-path predictor reads.
        path_embedding: width of its embedding.
        fit: of LLaPor, pre-attention and path.
        others: of the learned look-ahead and of history, which had their own choice of rates.
    """

    window: int = 128
    fit_tokens: int = 16384
    heldout_tokens: int = 4096
    score_tokens: int = 16384
    record_batch: int = 16
    llapor: LlaporConfig = LlaporConfig()
    context: int = 16
    path_embedding: int = 64
    fit: FitConfig = FitConfig(horizon_steps=800, learning_rate=1e-2)
    others: FitConfig = FitConfig(horizon_steps=800)
    tuning: TuningConfig = TuningConfig()
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)
        for name in ("window", "record_batch", "path_embedding"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(self.context >= 2, f"context={self.context} must be at least 2")
        for name in ("fit_tokens", "heldout_tokens", "score_tokens"):
            tokens = getattr(self, name)
            check(tokens >= self.window, f"{name}={tokens} is less than one window={self.window}")


def get_config() -> HiddenConfig:
    return HiddenConfig()
