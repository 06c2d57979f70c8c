"""A random OLMoE checkpoint of a named shape, and its decoding by transformers on torch CPU.

Both run in processes of their own. Every experts implementation that transformers has for CPU is
timed; the fastest counts.
"""

import dataclasses
import time
from typing import Any

import numpy as np

from experiments.bench.moe_layer_torch import IMPLEMENTATIONS
from moejax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is timed: `repeats` times a prompt of random tokens and greedy tokens behind it."""

    batch: int
    prompt: int
    new_tokens: int
    repeats: int
    vocab_size: int

    def tokens(self) -> np.ndarray:
        """int32 [batch, prompt], the same in every process."""
        draw = np.random.default_rng(self.batch)
        return draw.integers(0, self.vocab_size, (self.batch, self.prompt), np.int32)


def write_checkpoint(folder: str, cfg: DecoderConfig) -> None:
    """A float32 `OlmoeForCausalLM` with random weights of unit gain, and `cfg`'s shape."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    router = cfg.moe.router
    config = OlmoeConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.moe.d_ff,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.attention.num_heads,
        num_key_value_heads=cfg.attention.num_kv_heads,
        num_experts=router.num_experts,
        num_experts_per_tok=router.top_k,
        norm_topk_prob=router.renormalize,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder, max_shard_size="500MB")


def time_transformers(folder: str, work: Work, dtype: str, threads: int) -> dict[str, Any]:
    """Seconds of prefills and of decodes per implementation, and the tokens of the first."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    prompt = torch.from_numpy(work.tokens()).long()
    result: dict[str, Any] = {}
    for name in IMPLEMENTATIONS:
        if name == "batched_mm" and work.batch * work.prompt > 256:
            continue  # it copies the weights of every assignment
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), experts_implementation=name
        ).eval()
        runs = [_generate(model, prompt, work.new_tokens) for _ in range(work.repeats + 1)][1:]
        result[name] = {
            "prefill": [run[0] for run in runs],
            "decode": [run[1] for run in runs],
            "tokens": runs[0][2],
        }
    return result


def _generate(model, prompt, new_tokens: int) -> tuple[float, float, list[list[int]]]:
    """Seconds of the prefill, of the steps behind it, and all new tokens [B][N]."""
    import torch

    with torch.no_grad():
        begin = time.perf_counter()
        out = model(prompt, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        prefill, tokens = time.perf_counter() - begin, [token]
        begin = time.perf_counter()
        for _ in range(new_tokens - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            tokens.append(token)
        decode = time.perf_counter() - begin
    return prefill, decode, torch.cat(tokens, 1).tolist()
