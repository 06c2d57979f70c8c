"""Small random models of every architecture, written by `transformers`, and what they say."""

import atexit
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
LENGTHS = (11, 5)  # of the prompts of a batch


@dataclasses.dataclass(frozen=True)
class Case:
    """A `model_type` and, as JSON, the fields of its config that are not BASE's."""

    model_type: str
    shape: str
    fields: str

    def __str__(self) -> str:
        return f"{self.model_type}-{self.shape}"


@dataclasses.dataclass(frozen=True)
class Reference:
    """What `transformers` does with a model: rows of a batch padded on the left."""

    folder: pathlib.Path
    prompts: list[np.ndarray]  # int32
    tokens: np.ndarray  # int32 [B, N], greedy
    logits: list[np.ndarray]  # float32 [length + N, V], of prompt and tokens
    topk_idx: list[list[np.ndarray]]  # per MoE layer and row, int [length + N, K], sorted


def write_model(case: Case, folder: pathlib.Path, seed: int = 0):
    """A random model of unit gain in `folder`, so that attention and routing matter; returns it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)  # its threads wait for each other on a machine with few cores
    config = AutoConfig.for_model(case.model_type, **{**BASE, **json.loads(case.fields)})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)

    def fill(name, array):
        noise = torch.randn(array.shape, generator=generator)
        if name.endswith("correction_bias"):
            array.copy_(0.1 * noise)
        elif array.ndim == 1:  # norms start at one, biases and sinks at zero
            array.copy_(array + 0.1 * noise)
        else:
            array.copy_(noise * array.shape[-1] ** -0.5)

    with torch.no_grad():
        for name, array in model.named_parameters():
            fill(name, array)
        for name, array in model.named_buffers():
            if name.endswith("correction_bias"):
                fill(name, array)
    model.save_pretrained(folder)
    return model


@functools.cache
def reference(case: Case, new_tokens: int) -> Reference:
    """Greedy tokens, logits and routing of `case`."""
    import torch

    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{case}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model = write_model(case, folder)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 64, length).astype(np.int32) for length in LENGTHS]
    # Llama 4 in transformers counts padding in the temperature of its queries.
    batches = [[p] for p in prompts] if case.model_type == "llama4_text" else [prompts]
    tokens = np.concatenate([_generate(model, batch, new_tokens) for batch in batches])
    logits, chosen = [], []
    for prompt, row in zip(prompts, tokens, strict=True):
        whole = torch.tensor(np.concatenate([prompt, row]))[None].long()
        with torch.no_grad(), routers(model) as choices:
            logits.append(model(whole, use_cache=False).logits[0].numpy())
        chosen.append(choices)
    topk_idx = [list(layer) for layer in zip(*chosen, strict=True)]
    return Reference(folder, prompts, tokens, logits, topk_idx)


def _generate(model, prompts, new_tokens) -> np.ndarray:
    """Greedy tokens int32 [B, N] of prompts padded on the left."""
    import torch

    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor(np.stack([np.pad(p, (longest - len(p), 0)) for p in prompts])).long()
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, use_cache=True
        )
    return out[:, longest:].numpy().astype(np.int32)


class routers:
    """Records the experts that every router of `model` chooses, [T, K] sorted by id."""

    def __init__(self, model):
        self.model, self.choices, self.hooks = model, [], []

    def __enter__(self) -> list[np.ndarray]:
        for module in self.model.modules():
            if "Router" in type(module).__name__:
                self.hooks.append(module.register_forward_hook(self._record))
        return self.choices

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _record(self, module, args, output):
        import torch

        whole = [o for o in output if not torch.is_floating_point(o)]
        idx = whole[0] if whole else torch.topk(output[0], module.top_k, dim=-1).indices
        self.choices.append(np.sort(idx.numpy(), axis=-1))
