"""Static description of a decode comparison."""

import dataclasses

from moejax.core.errors import check, check_seed
from moejax.offload.budget import parse_budget
from moejax.offload.policies import PolicyName


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How the ways of serving experts are compared.

    Attributes:
        device_budget: what the device may hold, see `offload.budget.parse_budget`.
        policy: eviction policy of the slot cache; slots are divided equally over the layers.
        prefetch_lanes: experts fetched ahead per layer.
        batch_sizes, new_tokens: one comparison each.
        prompt_bytes: longest prompt; the prompts of a batch have unequal lengths.
        sample_bytes, temperature: of the generated sample.
    """

    device_budget: str = "25%"
    policy: PolicyName = "lru"
    prefetch_lanes: int = 4
    batch_sizes: tuple[int, ...] = (1, 16)
    new_tokens: tuple[int, ...] = (192, 48)
    prompt_bytes: int = 64
    sample_bytes: int = 320
    temperature: float = 0.6
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)
        parse_budget(self.device_budget)
        sizes, counts = self.batch_sizes, self.new_tokens
        check(
            len(sizes) == len(counts) > 0,
            f"batch_sizes={sizes} and new_tokens={counts} want one entry per comparison",
        )
        check(
            min(*sizes, *counts) >= 1,
            f"batch_sizes={sizes} and new_tokens={counts} must be positive",
        )
        check(len(set(sizes)) == len(sizes), f"batch_sizes={sizes} names a size twice")
        check(min(counts) >= 2, f"new_tokens={counts} must be at least 2: the first is not timed")
        check(self.prompt_bytes >= 4, f"prompt_bytes={self.prompt_bytes} must be at least 4")
        check(self.sample_bytes >= 1, f"sample_bytes={self.sample_bytes} must be at least 1")
        check(self.prefetch_lanes >= 1, f"prefetch_lanes={self.prefetch_lanes} must be at least 1")
        check(self.temperature > 0, f"temperature={self.temperature} must be positive")
