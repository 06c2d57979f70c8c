"""Recorded routing: which experts every token of every sequence chose, in every MoE layer.

Model code records `topk_idx` inside jit (`from_recorded`), readers of public formats build the same
struct, and predictors and the cache simulator consume it. numpy only.

Axis letters:
    L  MoE layers      T  tokens of all sequences, one after another      K  experts per token
    S  sequences       E  experts
"""

import dataclasses
import json
import os
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moejax.core.errors import InputError, check

FORMAT, VERSION = "moejax.routing_trace", 1
PREFILL, DECODE = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """Routing of S sequences. An absent choice has `topk_idx == num_experts` and weight 0.

    Absent choices are padding tokens, or tokens that a layer never saw: engines that want only the
    last token's logits skip the rest of the prompt in the last layer.
    """

    topk_idx: np.ndarray  # int32 [L, T, K], best first, num_experts where absent
    topk_weights: np.ndarray | None  # float32 [L, T, K], or None when not recorded
    num_experts: int
    expert_bytes: np.ndarray  # int64 [L], bytes of one expert of the layer
    sequence_lengths: np.ndarray  # int64 [S], sums to T
    prompt_lengths: np.ndarray  # int64 [S], leading tokens of the sequence routed in one pass
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON values

    def __post_init__(self):
        idx, e = self.topk_idx, self.num_experts
        check(idx.ndim == 3 and min(idx.shape) > 0, f"topk_idx is {idx.shape}, not [L, T, K]")
        check(idx.dtype == np.int32, f"topk_idx is {idx.dtype}, not int32")
        layers, tokens, _ = idx.shape
        low, high = int(idx.min()), int(idx.max())
        check(0 <= low and high <= e, f"topk_idx covers [{low}, {high}], not [0, num_experts={e}]")
        ordered = np.sort(idx, axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < e)
        if twice.any():
            layer, token, _ = np.argwhere(twice)[0]
            raise InputError(f"layer {layer}, token {token} chose an expert twice")
        if self.topk_weights is not None:
            shape, dtype = self.topk_weights.shape, self.topk_weights.dtype
            check(shape == idx.shape, f"topk_weights is {shape}, topk_idx {idx.shape}")
            check(dtype == np.float32, f"topk_weights is {dtype}, not float32")
        _check_integers("expert_bytes", self.expert_bytes, layers, low=1)
        _check_integers("sequence_lengths", self.sequence_lengths, None, low=1)
        _check_integers("prompt_lengths", self.prompt_lengths, len(self.sequence_lengths), low=0)
        total = int(self.sequence_lengths.sum())
        check(total == tokens, f"sequence_lengths sum to {total}, the trace has {tokens} tokens")
        check(
            bool((self.prompt_lengths <= self.sequence_lengths).all()),
            "a prompt is longer than its sequence",
        )

    @property
    def num_layers(self) -> int:
        return self.topk_idx.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.topk_idx.shape[1]

    @property
    def top_k(self) -> int:
        return self.topk_idx.shape[2]

    @property
    def sequence_starts(self) -> np.ndarray:
        """int64 [S], index of the first token of every sequence."""
        return np.cumsum(self.sequence_lengths) - self.sequence_lengths

    @property
    def sequence_ids(self) -> np.ndarray:
        """int64 [T], the sequence that a token belongs to."""
        return np.repeat(np.arange(len(self.sequence_lengths)), self.sequence_lengths)

    @property
    def phase(self) -> np.ndarray:
        """int8 [T], `PREFILL` for tokens of the prompt, `DECODE` after it."""
        position = np.arange(self.num_tokens) - self.sequence_starts[self.sequence_ids]
        return np.where(position < self.prompt_lengths[self.sequence_ids], PREFILL, DECODE).astype(
            np.int8
        )

    @property
    def present(self) -> np.ndarray:
        """bool [L, T, K], False where the choice is absent."""
        return self.topk_idx < self.num_experts


def from_recorded(
    topk_idx: ArrayLike,
    *,
    num_experts: int,
    expert_bytes: int | Sequence[int] | np.ndarray,
    topk_weights: ArrayLike | None = None,
    sequence_lengths: Sequence[int] | np.ndarray | None = None,
    prompt_lengths: Sequence[int] | np.ndarray | None = None,
    meta: Mapping[str, Any] | None = None,
) -> RoutingTrace:
    """Builds a trace from `topk_idx` [L, T, K] as a model records it (any integer array).

    Without `sequence_lengths` all tokens are one sequence; without `prompt_lengths` every token is
    a decode step. Raises `InputError` when the parts do not fit each other.
    """
    idx = np.asarray(topk_idx)
    check(np.issubdtype(idx.dtype, np.integer), f"topk_idx is {idx.dtype}, not integers")
    check(idx.ndim == 3, f"topk_idx is {idx.shape}, not [L, T, K]")
    if sequence_lengths is None:
        sequence_lengths = [idx.shape[1]]
    if prompt_lengths is None:
        prompt_lengths = np.zeros(len(sequence_lengths), np.int64)
    per_layer = np.asarray(expert_bytes)
    if per_layer.ndim == 0:
        per_layer = np.full(idx.shape[0], per_layer)
    return RoutingTrace(
        topk_idx=idx.astype(np.int32),
        topk_weights=None if topk_weights is None else np.asarray(topk_weights, np.float32),
        num_experts=num_experts,
        expert_bytes=per_layer,
        sequence_lengths=np.asarray(sequence_lengths),
        prompt_lengths=np.asarray(prompt_lengths),
        meta=dict(meta or {}),
    )


def take_sequences(trace: RoutingTrace, sequences: Sequence[int]) -> RoutingTrace:
    """The trace of some sequences only, in the given order (a split by file or by prompt)."""
    starts, lengths = trace.sequence_starts, trace.sequence_lengths
    for s in sequences:
        check(0 <= s < len(lengths), f"sequence {s} is not in [0, {len(lengths)})")
    check(len(sequences) > 0, "no sequences to take")
    tokens = np.concatenate([np.arange(starts[s], starts[s] + lengths[s]) for s in sequences])
    weights = trace.topk_weights
    return dataclasses.replace(
        trace,
        topk_idx=trace.topk_idx[:, tokens],
        topk_weights=None if weights is None else weights[:, tokens],
        sequence_lengths=lengths[list(sequences)],
        prompt_lengths=trace.prompt_lengths[list(sequences)],
    )


def save_trace(path: str | os.PathLike, trace: RoutingTrace) -> None:
    """Writes a compressed npz under a temporary name beside `path`, then renames it."""
    path = pathlib.Path(path)
    arrays = {
        "format": np.str_(FORMAT),
        "version": np.int64(VERSION),
        "meta": np.str_(json.dumps(dict(trace.meta), sort_keys=True)),
        "num_experts": np.int64(trace.num_experts),
        "topk_idx": trace.topk_idx,
        "expert_bytes": trace.expert_bytes,
        "sequence_lengths": trace.sequence_lengths,
        "prompt_lengths": trace.prompt_lengths,
    }
    if trace.topk_weights is not None:
        arrays["topk_weights"] = trace.topk_weights
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_trace(path: str | os.PathLike) -> RoutingTrace:
    """Reads what `save_trace` wrote; refuses anything else with the file and the reason."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or f"not a readable npz file ({error})"
        raise InputError(f"{path}: {reason}") from error
    if str(arrays.pop("format", "")) != FORMAT:
        raise InputError(f"{path}: an npz file, but not a {FORMAT}; it holds {sorted(arrays)[:8]}")
    version = arrays.pop("version", None)
    supported = version is not None and np.array_equal(version, VERSION)
    check(supported, f"{path}: {FORMAT} version {version}, this program reads {VERSION}")
    try:
        return RoutingTrace(
            topk_idx=arrays["topk_idx"],
            topk_weights=arrays.get("topk_weights"),
            num_experts=int(arrays["num_experts"]),
            expert_bytes=arrays["expert_bytes"],
            sequence_lengths=arrays["sequence_lengths"],
            prompt_lengths=arrays["prompt_lengths"],
            meta=dict(json.loads(str(arrays["meta"]))),
        )
    except KeyError as error:
        raise InputError(f"{path}: {FORMAT} without {error.args[0]!r}") from error
    except (ValueError, TypeError) as error:  # also what NumPy and JSON say of wrong parts
        raise InputError(f"{path}: {error}") from error


def _check_integers(name: str, array: np.ndarray, length: int | None, low: int) -> None:
    check(
        array.ndim == 1 and len(array) > 0 and np.issubdtype(array.dtype, np.integer),
        f"{name} is {array.dtype}{list(array.shape)}, not a list of integers",
    )
    check(length in (None, len(array)), f"{name} has {len(array)} entries, expected {length}")
    check(int(array.min()) >= low, f"{name} holds {int(array.min())}, below {low}")
