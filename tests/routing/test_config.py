"""Gate configs that cannot work are refused with their numbers."""

import pytest

from moejax.core.errors import InputError
from moejax.routing.config import RouterConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_experts=0, top_k=1), "num_experts=0 must be at least 1"),
        (dict(num_experts=8, top_k=9), "top_k=9 must be between 1 and num_experts=8"),
        (dict(num_experts=8, top_k=0), "top_k=0 must be between 1 and num_experts=8"),
        (dict(num_experts=8, top_k=2, num_groups=3), "num_experts=8 is not divisible by num_gro"),
        (dict(num_experts=8, top_k=2, num_groups=0), "num_experts=8 is not divisible by num_gro"),
        (
            dict(num_experts=8, top_k=2, num_groups=4, top_groups=5),
            "top_groups=5 must be between 1 and num_groups=4",
        ),
        (
            dict(num_experts=8, top_k=5, num_groups=4, top_groups=2),
            "top_k=5 exceeds the 4 experts of top_groups=2 groups",
        ),
        (
            dict(num_experts=4, top_k=2, num_groups=4, top_groups=2, group_score="top2_sum"),
            "num_experts=4 / num_groups=4",
        ),
        (dict(num_experts=8, top_k=2, score="relu"), "score='relu' is neither softmax nor sigm"),
        (dict(num_experts=8, top_k=2, group_score="mean"), "group_score='mean' is neither max"),
        (dict(num_experts=8, top_k=2, group_choice="all"), "group_choice='all' is neither best"),
        (
            dict(num_experts=8, top_k=2, num_groups=4, group_choice="balanced"),
            "top_k=2 is not divisible by num_groups=4 balanced groups",
        ),
        (
            dict(num_experts=8, top_k=4, num_groups=4, top_groups=2, group_choice="balanced"),
            "top_groups=2 has no meaning with balanced groups",
        ),
        (dict(num_experts=8, top_k=2, projection_dim=-1), "projection_dim=-1 is negative"),
        (dict(num_experts=8, top_k=2, temperature=0.0), "temperature=0.0 is not a positive number"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(InputError) as error:
        RouterConfig(**fields)
    assert message in str(error.value)


def test_published_gates_are_accepted_and_hashable():
    deepseek_v3 = RouterConfig(
        num_experts=256,
        top_k=8,
        score="sigmoid",
        scaling_factor=2.5,
        correction_bias=True,
        num_groups=8,
        top_groups=4,
        group_score="top2_sum",
    )
    olmoe = RouterConfig(num_experts=64, top_k=8, renormalize=False)
    every = RouterConfig(num_experts=4, top_k=4)
    moge = RouterConfig(num_experts=64, top_k=8, num_groups=8, group_choice="balanced")
    x_moe = RouterConfig(num_experts=32, top_k=1, projection_dim=16, renormalize=False)
    every_gate = [deepseek_v3, olmoe, every, moge, x_moe]
    assert len(set(every_gate)) == 5
    names = ["group_limited", "top_k", "top_k", "balanced_groups", "top_k"]
    assert [cfg.gate for cfg in every_gate] == names and all(cfg.causal for cfg in every_gate)
