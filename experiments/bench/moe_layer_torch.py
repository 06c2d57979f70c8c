"""The same layer in transformers: `Qwen3MoeSparseMoeBlock` on torch CPU. Runs in its own process.

It times every experts implementation that transformers has for CPU. Its time includes its router,
0.3 % of the operations.
"""

import importlib.util
import time
from collections.abc import Callable

from moejax.kernels.grouped_matmul.shapes import ExpertShape

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
PACKAGES = ("torch", "transformers")


def missing_packages() -> list[str]:
    """Packages that this arm needs and that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def make_block(shape: ExpertShape, implementation: str, *, seed: int = 0) -> Callable:
    """A block with random weights, in evaluation mode."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.d_model,
        moe_intermediate_size=shape.d_ff,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return block


def time_block(
    shape: ExpertShape, *, calls: int, routings: int, threads: int
) -> dict[str, list[float]]:
    """Seconds of `calls` calls per implementation, after two calls of warm-up."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    # Random inputs make random routing, so experts rotate here too.
    inputs = [torch.randn(1, shape.num_tokens, shape.d_model) for _ in range(routings)]
    seconds: dict[str, list[float]] = {}
    want = None
    with torch.no_grad():
        for name in IMPLEMENTATIONS:
            if name == "batched_mm" and shape.num_tokens > 16:
                continue  # it copies the weights of every assignment: 12 GiB at 512 tokens
            block, times = make_block(shape, name), []
            got = block(inputs[0])
            want = got if want is None else want
            if not torch.allclose(got, want, atol=1e-4 * float(want.abs().max())):
                raise RuntimeError(f"transformers: {name} differs from {IMPLEMENTATIONS[0]}")
            for i in range(calls + 2):
                begin = time.perf_counter()
                block(inputs[i % routings])
                times.append(time.perf_counter() - begin)
            seconds[name] = times[2:]
    return seconds
