"""Named shapes of grouped matrix products in real models: one list for tests and benchmarks.

Sizes are those of the published model configs; `num_tokens` is the batch that makes each a case of
decode (memory bound) or training (compute bound).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """One layer's experts and the tokens that visit them."""

    num_tokens: int
    num_experts: int
    top_k: int
    d_model: int
    d_ff: int

    @property
    def num_rows(self) -> int:
        """Assignments, the rows of the grouped product."""
        return self.num_tokens * self.top_k


SHAPES: dict[str, ExpertShape] = {
    "bench": ExpertShape(num_tokens=512, num_experts=32, top_k=4, d_model=512, d_ff=1024),
    "bench_decode": ExpertShape(num_tokens=1, num_experts=32, top_k=4, d_model=512, d_ff=1024),
    "olmoe": ExpertShape(num_tokens=4096, num_experts=64, top_k=8, d_model=2048, d_ff=1024),
    "qwen3_30b_a3b": ExpertShape(num_tokens=4096, num_experts=128, top_k=8, d_model=2048, d_ff=768),
    "mixtral_8x7b": ExpertShape(num_tokens=4096, num_experts=8, top_k=2, d_model=4096, d_ff=14336),
    "deepseek_v3": ExpertShape(num_tokens=4096, num_experts=256, top_k=8, d_model=7168, d_ff=2048),
    "deepseek_v3_decode": ExpertShape(
        num_tokens=64, num_experts=256, top_k=8, d_model=7168, d_ff=2048
    ),
}


def tiny(shape: ExpertShape) -> ExpertShape:
    """The same ratios at a size that a test can afford."""
    return ExpertShape(
        num_tokens=max(1, shape.num_tokens // 64),
        num_experts=max(shape.top_k, shape.num_experts // 8),
        top_k=shape.top_k,
        d_model=max(8, shape.d_model // 128),
        d_ff=max(8, shape.d_ff // 128),
    )


def draw_group_sizes(shape: ExpertShape, *, zipf: float, seed: int) -> np.ndarray:
    """int32 [E] rows per expert when distinct experts are drawn by a zipf law of that exponent.

    0 is uniform. Which expert is popular is drawn too.
    """
    topk_idx, _ = draw_routing(shape, zipf=zipf, seed=seed)
    return np.bincount(topk_idx.reshape(-1), minlength=shape.num_experts).astype(np.int32)


def draw_routing(shape: ExpertShape, *, zipf: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """topk_idx int32 [T, K] without repeats in a row, and topk_weights float32 [T, K] summing to 1.

    Sampling without replacement by Gumbel top-k.
    """
    draw = np.random.default_rng(seed)
    logits = -zipf * np.log(np.arange(1, shape.num_experts + 1))
    noisy = logits + draw.gumbel(size=(shape.num_tokens, shape.num_experts))
    ranked = np.argsort(-noisy, axis=1)[:, : shape.top_k]
    topk_idx = draw.permutation(shape.num_experts)[ranked]
    topk_weights = draw.dirichlet(np.ones(shape.top_k), size=shape.num_tokens)
    return topk_idx.astype(np.int32), topk_weights.astype(np.float32)
