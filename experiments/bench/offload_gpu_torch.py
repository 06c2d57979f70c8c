"""The same decoding by transformers under accelerate's CPU offload. Runs in its own process.

`infer_auto_device_map` gives the device as many layers as its budget holds, with room for the
largest of the others, which accelerate moves to the device whenever they are called and drops
afterwards. This is what `device_map="auto"` does with a checkpoint.
"""

import importlib.util
import statistics
import time
from typing import Any

from experiments.bench.decode_torch import Work
from moejax.layers.attention import AttentionConfig
from moejax.models.config import DecoderConfig

PACKAGES = ("torch", "transformers", "accelerate")


def missing_packages() -> list[str]:
    """Packages that this side needs and that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def random_model(cfg: DecoderConfig, seed: int, device: str):
    """A bfloat16 `MixtralForCausalLM` of `cfg`'s shape in host memory, weights of unit gain.

    Drawn on `device`, parameter by parameter: torch draws on a CPU core for minutes.
    """
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.initialization import no_init_weights

    attention = cfg.attention
    assert isinstance(attention, AttentionConfig)
    config = MixtralConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.moe.d_ff,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        num_local_experts=cfg.moe.num_experts,
        num_experts_per_tok=cfg.moe.router.top_k,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="bfloat16",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            model = MixtralForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # a norm
                parameter.fill_(1)
                continue
            for part in parameter if parameter.ndim == 3 else [parameter]:  # an expert at a time
                noise = torch.empty(part.shape, dtype=part.dtype, device=device)
                part.copy_(noise.normal_(std=part.shape[-1] ** -0.5, generator=generator))
    return model


def offload(model, budget: int):
    """Spreads the model over the first GPU, `budget` bytes of it, and host memory."""
    import accelerate  # pyrefly: ignore[missing-import]
    import torch

    if not torch.cuda.is_available():
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    places = accelerate.infer_auto_device_map(
        model,
        max_memory={0: budget, "cpu": 1 << 50},
        no_split_module_classes=["MixtralDecoderLayer"],
        dtype=torch.bfloat16,
    )
    return accelerate.dispatch_model(model, device_map=places, main_device=0)


def run(cfg: DecoderConfig, jobs: list[Work], budget: int, seed: int) -> dict[str, Any]:
    """Figures by batch size; steps are medians, as they are on the other side."""
    import torch

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    model = offload(random_model(cfg, seed, device), budget)
    figures = {str(job.batch): time_job(model, job, device) for job in jobs}
    return {
        "batch": figures,
        "device_bytes_peak": torch.cuda.max_memory_allocated() if gpu else None,
        "gpu": gpu,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
    }


def time_job(model, job: Work, device: str) -> dict[str, Any]:
    """Seconds to the first token, and tokens per second of the median step behind it."""
    import torch

    token = torch.from_numpy(job.tokens()).long().to(device)
    seconds, cache = [], None
    with torch.no_grad():
        for _ in range(job.new_tokens):
            begin = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            token, cache = out.logits[:, -1:].argmax(-1).to(device), out.past_key_values
            token.tolist()  # waits for the device
            seconds.append(time.perf_counter() - begin)
    step = statistics.median(seconds[1:])
    return {"ttft_s": seconds[0], "tokens_per_s": job.batch / step}
