"""The architectures that can be read, by `model_type`."""

import importlib
import pathlib
from typing import Any

from moejax.core.errors import InputError
from moejax.interop.hf.architecture import Architecture

MODEL_TYPES = (
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "llama4_text",
    "longcat_flash",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
)


def find_architecture(values: dict[str, Any], where: pathlib.Path) -> Architecture:
    """That of a config.json; `InputError` for one that is not known. No code of it is run."""
    name = values.get("model_type")
    if name not in MODEL_TYPES:
        raise InputError(
            f"{where}: model_type={name!r} is not supported, only {', '.join(MODEL_TYPES)}"
        )
    module = importlib.import_module(f"moejax.interop.hf.{name}")
    return module.ARCHITECTURE
