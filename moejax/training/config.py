"""Static description of a training run."""

import dataclasses
from typing import Literal, get_args

from moejax.core.errors import check, check_seed
from moejax.dispatch.config import DispatchConfig
from moejax.training.offloading import OffloadingConfig

MemoryKind = Literal["device", "pinned_host"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        seed: of the initial weights and of the data order.
        horizon_secs: length of the run in seconds of training, compilation excluded. The learning
            rate follows the elapsed fraction of it, so a slow machine ends as annealed as a fast
            one.
        horizon_steps: length in steps instead; wins over `horizon_secs` when given and makes the
            run reproducible step for step.
        checkpoint_secs, checkpoint_steps: how often to save; the latter wins when given. The last
            step is always saved.
        warmup_fraction: share of the horizon in which the learning rate rises linearly from zero.
        final_fraction: share of the peak at which its cosine ends.
        load_balancing_weight, router_z_weight: of the auxiliary losses, averaged over layers.
        bias_rate: by how much a step moves the correction biases of routers that have them.
        offloading: terms of the loss that make experts easier to offload.
        dispatch: how tokens reach experts, on a mesh.
        fully_sharded: on a mesh, weights and optimizer state are split over all ranks instead of
            copied; see `moejax.training.sharding`.
        experts_memory: where experts and their optimizer state lie between steps, on a mesh.
    """

    batch_size: int = 8
    seq_len: int = 128
    seed: int = 0
    horizon_secs: float = 170.0
    horizon_steps: int | None = None
    checkpoint_secs: float = 30.0
    checkpoint_steps: int | None = None
    learning_rate: float = 2e-3
    warmup_fraction: float = 0.05
    final_fraction: float = 0.02
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    load_balancing_weight: float = 0.01
    router_z_weight: float = 0.0
    bias_rate: float = 1e-3
    offloading: OffloadingConfig = OffloadingConfig()
    dispatch: DispatchConfig = DispatchConfig()
    fully_sharded: bool = False
    experts_memory: MemoryKind = "device"

    def __post_init__(self):
        check_seed(self.seed)
        for name in ("batch_size", "seq_len"):
            value = getattr(self, name)
            check(value >= 1, f"{name}={value} must be at least 1")
        for name in ("horizon_secs", "checkpoint_secs", "learning_rate", "clip_norm", "eps"):
            value = getattr(self, name)
            check(value > 0, f"{name}={value} must be positive")
        for name in ("horizon_steps", "checkpoint_steps"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name}={value} must be at least 1")
        for name in ("weight_decay", "load_balancing_weight", "router_z_weight", "bias_rate"):
            value = getattr(self, name)
            check(value >= 0, f"{name}={value} must not be negative")
        kinds = get_args(MemoryKind)
        check(
            self.experts_memory in kinds,
            f"experts_memory={self.experts_memory!r} is not one of {kinds}",
        )
        for name in ("b1", "b2", "warmup_fraction"):
            value = getattr(self, name)
            check(0 <= value < 1, f"{name}={value} must be in [0, 1)")
        check(
            0 <= self.final_fraction <= 1,
            f"final_fraction={self.final_fraction} must be in [0, 1]",
        )
        check(
            not (self.fully_sharded and self.offloading.predictability_weight),
            "the predictability loss reads all routers at once, which fully_sharded splits",
        )
