"""Static description of a token-choice gate."""

import dataclasses
from typing import Literal

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
        num_groups, top_groups, group_score: group-limited routing. Experts form `num_groups` equal
            groups, a token may choose inside the `top_groups` best. A group scores its best expert
            (`max`, DeepSeek-V2) or the sum of its two best (`top2_sum`, DeepSeek-V3).
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scaling_factor: float = 1.0
    correction_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"

    def __post_init__(self):
        e, k, g, top = self.num_experts, self.top_k, self.num_groups, self.top_groups
        check(
            self.score in ("softmax", "sigmoid"),
            f"score={self.score!r} is neither softmax nor sigmoid",
        )
        check(
            self.group_score in ("max", "top2_sum"),
            f"group_score={self.group_score!r} is neither max nor top2_sum",
        )
        check(e >= 1, f"num_experts={e} must be at least 1")
        check(1 <= k <= e, f"top_k={k} must be between 1 and num_experts={e}")
        check(g >= 1 and e % g == 0, f"num_experts={e} is not divisible by num_groups={g}")
        check(1 <= top <= g, f"top_groups={top} must be between 1 and num_groups={g}")
        check(
            k <= top * (e // g),
            f"top_k={k} exceeds the {top * (e // g)} experts of top_groups={top} groups",
        )
        check(
            self.group_score == "max" or e // g >= 2,
            f"group_score=top2_sum wants 2 experts in a group, num_experts={e} / num_groups={g}",
        )
