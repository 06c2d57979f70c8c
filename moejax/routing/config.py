"""Static descriptions of gates: token choice, expert choice, soft."""

import dataclasses
import math
from typing import ClassVar, Literal, TypeAlias

from moejax.core.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Which experts a token takes, and with what weights.

    Attributes:
        score: `softmax` over all experts (Mixtral, OLMoE, Qwen) or an independent `sigmoid` per
            expert (DeepSeek-V3, GLM-4).
        renormalize: divide the chosen scores by their sum.
        scaling_factor: multiplies the final weights (`routed_scaling_factor`).
        correction_bias: a learned or balanced bias is added to the scores for the *choice* only;
            weights come from the unbiased scores (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
        num_groups: experts form so many equal groups.
        group_choice: `best`, a token chooses inside its `top_groups` best groups (DeepSeek), or
            `balanced`, it takes top_k / num_groups experts of each (MoGE, arXiv 2505.21411).
        top_groups, group_score: a group scores its best expert (`max`, DeepSeek-V2) or the sum of
            its two best (`top2_sum`, DeepSeek-V3).
        bias: a learned bias is added to the logits (gpt-oss).
        mixer_threshold: experts and weights come from the sparse mixer with this threshold (see
            `sparse_mixer`); 0 for the usual choice.
        projection_dim: logits are the cosines between tokens, projected to so many dimensions, and
            experts, over a learned temperature that starts at `temperature` (X-MoE, arXiv
            2204.09179); 0 for the usual linear logits.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scaling_factor: float = 1.0
    correction_bias: bool = False
    bias: bool = False
    mixer_threshold: float = 0.0
    num_groups: int = 1
    group_choice: Literal["best", "balanced"] = "best"
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    projection_dim: int = 0
    temperature: float = 0.3

    causal: ClassVar[bool] = True  # a token's experts do not depend on other tokens

    def __post_init__(self):
        e, k = self.num_experts, self.top_k
        check(
            self.score in ("softmax", "sigmoid"),
            f"score={self.score!r} is neither softmax nor sigmoid",
        )
        check(e >= 1, f"num_experts={e} must be at least 1")
        check(1 <= k <= e, f"top_k={k} must be between 1 and num_experts={e}")
        check(self.projection_dim >= 0, f"projection_dim={self.projection_dim} is negative")
        mixer = self.mixer_threshold
        check(mixer >= 0, f"mixer_threshold={mixer} is negative")
        check(
            not mixer
            or (self.score == "softmax" and self.num_groups == 1 and not self.renormalize),
            "the sparse mixer wants softmax scores without groups and without renormalize",
        )
        check(
            0 < self.temperature < math.inf,
            f"temperature={self.temperature} is not a positive number",
        )
        self._check_groups()

    def _check_groups(self):
        e, k, g, top = self.num_experts, self.top_k, self.num_groups, self.top_groups
        check(
            self.group_score in ("max", "top2_sum"),
            f"group_score={self.group_score!r} is neither max nor top2_sum",
        )
        check(
            self.group_choice in ("best", "balanced"),
            f"group_choice={self.group_choice!r} is neither best nor balanced",
        )
        check(g >= 1 and e % g == 0, f"num_experts={e} is not divisible by num_groups={g}")
        if self.group_choice == "balanced":
            check(k % g == 0, f"top_k={k} is not divisible by num_groups={g} balanced groups")
            check(top == 1, f"top_groups={top} has no meaning with balanced groups")
            return
        check(1 <= top <= g, f"top_groups={top} must be between 1 and num_groups={g}")
        check(
            k <= top * (e // g),
            f"top_k={k} exceeds the {top * (e // g)} experts of top_groups={top} groups",
        )
        check(
            self.group_score == "max" or e // g >= 2,
            f"group_score=top2_sum wants 2 experts in a group, num_experts={e} / num_groups={g}",
        )

    @property
    def gate(self) -> str:
        """Its name in the table of dispatch strategies."""
        if self.group_choice == "balanced":
            return "balanced_groups"
        return "top_k" if self.num_groups == 1 else "group_limited"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoiceConfig:
    """Every expert takes its C best tokens of a group (arXiv 2202.09368).

    Attributes:
        capacity_factor: mean number of experts per token, the paper's c.
    """

    num_experts: int
    capacity_factor: float = 2.0

    gate: ClassVar[str] = "expert_choice"
    causal: ClassVar[bool] = False

    def __post_init__(self):
        e, c = self.num_experts, self.capacity_factor
        check(e >= 1, f"num_experts={e} must be at least 1")
        check(0 < c <= e, f"capacity_factor={c} must be positive and at most num_experts={e}")

    def slots(self, num_tokens: int) -> int:
        """C = c T / E, rounded, at least 1 and at most T; T counts padding.

        >>> ExpertChoiceConfig(num_experts=8, capacity_factor=2.0).slots(64)
        16
        """
        wanted = round(self.capacity_factor * num_tokens / self.num_experts)
        return min(max(wanted, 1), num_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftConfig:
    """Every slot is a mean of all tokens of a group, every token of all slots (2308.00951)."""

    num_experts: int
    slots_per_expert: int = 1

    gate: ClassVar[str] = "soft"
    causal: ClassVar[bool] = False

    def __post_init__(self):
        e, c = self.num_experts, self.slots_per_expert
        check(e >= 1, f"num_experts={e} must be at least 1")
        check(c >= 1, f"slots_per_expert={c} must be at least 1")


SlotConfig: TypeAlias = ExpertChoiceConfig | SoftConfig
