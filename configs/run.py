"""What a config of `experiments/train.py` consists of; each file beside this one may make one."""

import dataclasses

from configs.model import ModelConfig
from moejax.core.errors import check
from moejax.data.domains import DomainsConfig
from moejax.data.text import TextConfig
from moejax.sync.config import SyncConfig
from moejax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis, those of all processes together."""

    data: int = 1
    expert: int = 1
    model: int = 1

    def __post_init__(self):
        for axis, size in dataclasses.asdict(self).items():
            check(size >= 1, f"mesh axis {axis}={size} must be at least 1")

    @property
    def size(self) -> int:
        return self.data * self.expert * self.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that `--set` reaches.

    Attributes:
        data: a text's bytes, or byte-pair tokens of several kinds of text.
        sync: what crosses `data`; by default the gradients, in every step.
        log_steps: how often metrics go to tensorboard; the log in the checkpoint has every step.
        eval_steps: how often held-out text is scored and the load of every expert is recorded.
        eval_batches: batches of held-out text that are scored.
    """

    data: TextConfig | DomainsConfig = TextConfig()
    model: ModelConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    sync: SyncConfig = SyncConfig()
    log_steps: int = 10
    eval_steps: int = 100
    eval_batches: int = 4

    def __post_init__(self):
        for name in ("log_steps", "eval_steps", "eval_batches"):
            value = getattr(self, name)
            check(value >= 1, f"{name}={value} must be at least 1")
