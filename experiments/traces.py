"""Routing traces by path or by name: the flag, the reader, and what models' files do not say."""

import dataclasses
import os
import pathlib
import zipfile

import numpy as np
from absl import flags

from moejax.core.errors import InputError, check
from moejax.data.route_csv import RecordedRouting, read_route_csv
from moejax.data.routing_trace import RoutingTrace, from_recorded, load_trace

TRACE = flags.DEFINE_string(
    "trace", None, "route_trace v1 CSV, RoutingTrace npz, or a name: see experiments/traces.py"
)
SHIPPED = pathlib.Path(__file__).parents[1] / "tests" / "data" / "traces"
FOLDER = "MOEJAX_TRACES"  # environment variable: traces that may not be shipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model whose routing is recorded, and what its trace does not hold."""

    file: str  # in SHIPPED, or in the folder that FOLDER names
    shipped: bool
    dense_bytes: float  # of a layer's attention, router and shared experts: mean over layers
    bits_per_weight: float  # of the experts as stored


# Shipped: the dense bytes are those of the files' preambles, the bits those bytes of an expert over
# 3 D F weights (Qwen3 2048 x 768, gemma-4 2816 x 704, gpt-oss 2880 x 2880). DeepSeek-V2-Lite in
# bfloat16: attention 2048 x 3072 + 2048 x 576 + 512 x 4096 + 2048 x 2048, two shared experts.
MODELS = {
    "qwen": Model(file="qwen.route.csv", shipped=True, dense_bytes=11817984, bits_per_weight=5.19),
    "gemma": Model(
        file="gemma.route.csv", shipped=True, dense_bytes=42782800, bits_per_weight=5.83
    ),
    "gptoss": Model(
        file="gptoss.route.csv", shipped=True, dense_bytes=23003648, bits_per_weight=4.25
    ),
    "deepseek_v2_lite": Model(
        file="deepseek_v2_lite_routing_train200.npz",
        shipped=False,
        dense_bytes=2 * (2048 * (3072 + 576 + 2048) + 512 * 4096 + 2 * 3 * 2048 * 1408),
        bits_per_weight=16.0,
    ),
}


def open_trace(text: str | None) -> tuple[RoutingTrace, RecordedRouting | None]:
    """The trace at a path or of that name and, from a CSV, what the recording run's cache did."""
    check(bool(text), "--trace is missing; give a route_trace v1 CSV or a RoutingTrace npz")
    path = str(text)
    if path in MODELS:
        path = str(_path_of(path))
    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
    except OSError as error:
        raise InputError(f"--trace={path}: {error.strerror}") from error
    if not is_zip:
        recorded = read_route_csv(path)
        return recorded.trace, recorded
    if pathlib.Path(path).name == MODELS["deepseek_v2_lite"].file:
        return _read_sets(path), None
    return load_trace(path), None


def _path_of(name: str) -> pathlib.Path:
    model = MODELS[name]
    if model.shipped:
        return SHIPPED / model.file
    folder = os.environ.get(FOLDER)
    check(bool(folder), f"--trace={name}: not shipped; name its folder in {FOLDER}")
    return pathlib.Path(str(folder)) / model.file


def _read_sets(path: str) -> RoutingTrace:
    """DeepSeek-V2-Lite's routing as sets: `ids` [L, T, 6] of all prompts, `lens` their tokens."""
    try:
        with np.load(path, allow_pickle=False) as file:
            idx, lengths = file["ids"], file["lens"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an npz of `ids` and `lens` ({error})") from error
    return from_recorded(
        idx,
        num_experts=64,
        expert_bytes=2 * 3 * 2048 * 1408,
        sequence_lengths=lengths,
        meta={"model": "DeepSeek-V2-Lite"},
    )
