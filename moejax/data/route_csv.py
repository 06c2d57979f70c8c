"""Strict reader of `route_trace v1`, the CSV of github.com/Helldez/BigMoeOnEdge.

A preamble of `#` lines, a header, then one row per routed expert. `step` is the position of the
token in its conversation; prefill (phase 0) is one pass over many steps, decode (phase 1) one step
at a time. `weight` may be `nan` for "not recorded". `residency` is 0 when the choice faced a
missing expert, 1 when it was cached, 2 when a speculative read had just brought it; `expert_bytes`
is what this row's choice read from storage. During prefill every row keeps residency 0 while only
the first row of a missing expert carries its bytes, so a miss is a row with bytes. Only layers
with experts have rows; in prefill the last layer may have routed the last token alone.

Axis letters:
    R  rows      L  layers with experts      T  tokens of all turns      K  experts per token
"""

import dataclasses
import os
import pathlib
import re

import numpy as np

from moejax.core.errors import InputError, check
from moejax.data.routing_trace import DECODE, PREFILL, RoutingTrace

MAGIC = "# route_trace v1"
COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes".split(",")
WEIGHT = COLUMNS.index("weight")
INTEGER = r"(\d{1,18})"
NUMBER = r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan)"
ROW = re.compile(
    ",".join(NUMBER if name == "weight" else INTEGER for name in COLUMNS) + r"(?:,0)?", re.ASCII
)
MODEL = re.compile(
    r"# model=(?P<model>.*) arch=(?P<arch>\S+) n_layer=(?P<n_layer>\d+)"
    r" n_expert=(?P<n_expert>\d+) n_expert_used=(?P<n_expert_used>\d+)"
)
LAYER = re.compile(r"# layer=(\d+) expert_bytes=(\d+) dense_bytes=(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RecordedRouting:
    """A trace, and what the cache of the recording run did with every choice."""

    trace: RoutingTrace
    residency: np.ndarray  # int8 [L, T, K], -1 where absent
    bytes_read: np.ndarray  # int64 [L, T, K], 0 or the layer's expert_bytes


@dataclasses.dataclass(frozen=True)
class _Preamble:
    model: str
    arch: str
    num_layers: int
    num_experts: int
    top_k: int
    expert_bytes: dict[int, int]
    rows_start: int  # index of the first line after the header


def read_route_csv(path: str | os.PathLike) -> RecordedRouting:
    """Reads a whole file; `InputError` with file, line and reason for anything unexpected.

    Layers are renumbered to the ones that have rows (`meta['layers']` keeps their numbers). A turn
    is a sequence. Cost: under half a second for 45,000 rows.
    """
    path = pathlib.Path(path)
    lines = _read_lines(path)
    preamble = _read_preamble(path, lines)
    first = preamble.rows_start
    columns, weights = _parse_rows(path, lines, first)
    _check_rows(path, first, columns, weights, preamble)
    layers, layer = np.unique(columns["layer"], return_inverse=True)
    order, tokens = _number_tokens(path, first, columns)
    _check_complete(path, first, columns, tokens, layers, preamble)
    return _assemble(columns, weights, layer, layers, order, tokens, preamble)


def _read_lines(path: pathlib.Path) -> list[str]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    check(len(raw) > 0, f"{path}: the file is empty")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8") from error
    lines = text.split("\n")
    if lines[0] != MAGIC:
        raise InputError(f"{path}:1: expected {MAGIC!r}, got {lines[0][:60]!r}")
    if lines.pop() != "":
        raise InputError(f"{path}:{len(lines) + 1}: no newline at the end: the file is truncated")
    return lines


def _read_preamble(path: pathlib.Path, lines: list[str]) -> _Preamble:
    model, expert_bytes, at = None, {}, 1
    while at < len(lines) and lines[at].startswith("#"):
        if match := MODEL.fullmatch(lines[at]):
            model = match
        elif match := LAYER.fullmatch(lines[at]):
            layer, size, _ = map(int, match.groups())
            check(layer not in expert_bytes, f"{path}:{at + 1}: layer {layer} is listed twice")
            expert_bytes[layer] = size
        else:
            raise InputError(f"{path}:{at + 1}: neither a model nor a layer line: {lines[at]!r}")
        at += 1
    if model is None:
        raise InputError(f"{path}: the preamble has no '# model=... n_expert_used=...' line")
    header = lines[at] if at < len(lines) else "the end of the file"
    if header not in (",".join(COLUMNS), ",".join([*COLUMNS, "dropped"])):
        raise InputError(f"{path}:{at + 1}: expected the header {','.join(COLUMNS)}, got {header}")
    check(at + 1 < len(lines), f"{path}: no rows after the header")
    return _Preamble(
        model["model"],
        model["arch"],
        int(model["n_layer"]),
        int(model["n_expert"]),
        int(model["n_expert_used"]),
        expert_bytes,
        at + 1,
    )


def _parse_rows(
    path: pathlib.Path, lines: list[str], first: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    matches = [ROW.fullmatch(line) for line in lines[first:]]
    if None in matches:
        at = matches.index(None)
        raise InputError(f"{path}:{first + at + 1}: {_diagnose(lines[first + at])}")
    fields = list(zip(*(match.groups() for match in matches if match), strict=True))
    with np.errstate(over="ignore"):  # refused with its line number below
        weights = np.array(fields[WEIGHT], np.float32)
    return {
        name: np.array(list(map(int, fields[i])), np.int64)
        for i, name in enumerate(COLUMNS)
        if i != WEIGHT
    }, weights


def _diagnose(row: str) -> str:
    """Why `row` does not match."""
    fields = row.split(",")
    if len(fields) not in (len(COLUMNS), len(COLUMNS) + 1):
        return f"{len(fields)} columns, expected {len(COLUMNS)}: {row[:80]!r}"
    for name, field in zip(COLUMNS, fields, strict=False):
        pattern = NUMBER if name == "weight" else INTEGER
        if not re.fullmatch(pattern, field, re.ASCII):
            kind = "number" if name == "weight" else "integer"
            return f"{name}={field!r} is not a non-negative {kind}"
    return f"dropped={fields[-1]!r}: this run skipped experts, so its routing cannot be replayed"


def _check_rows(path, first, columns, weights, preamble: _Preamble) -> None:
    """Every rule that a row can break by itself, or against the rows around it."""
    listed = np.array([preamble.expert_bytes.get(i, 0) for i in range(preamble.num_layers)])

    def refuse(wrong: np.ndarray, reason: str) -> None:
        if wrong.any():
            at = int(np.argmax(wrong))
            row = {name: int(column[at]) for name, column in columns.items()}
            raise InputError(f"{path}:{first + at + 1}: {reason.format(**row)}")

    refuse(columns["phase"] > 1, "phase={phase}, expected 0 (prefill) or 1 (decode)")
    refuse(columns["layer"] >= preamble.num_layers, f"layer={{layer}} >= {preamble.num_layers}")
    refuse(columns["slot"] >= preamble.top_k, f"slot={{slot}} >= n_expert_used={preamble.top_k}")
    refuse(
        columns["expert"] >= preamble.num_experts,
        f"expert={{expert}} >= n_expert={preamble.num_experts}",
    )
    refuse(np.isnan(weights) != np.isnan(weights[0]), "weight is nan in some rows only")
    refuse(np.isinf(weights), "weight overflows float32")
    refuse(columns["residency"] > 2, "residency={residency}, expected 0, 1 or 2")
    size = listed[columns["layer"]]
    refuse(size == 0, "layer={layer} has no expert_bytes in the preamble")
    read = columns["expert_bytes"]
    refuse((read != 0) & (read != size), "expert_bytes={expert_bytes} is not the layer's")
    refuse((read != 0) & (columns["residency"] != 0), "bytes read although residency={residency}")
    cell = ("turn", "phase", "step", "layer")
    refuse(_repeats(columns, (*cell, "slot")), "slot={slot} appears twice in this step and layer")
    refuse(_repeats(columns, (*cell, "expert")), "expert={expert} was chosen twice by this token")


def _repeats(columns: dict[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    """bool [R]: an earlier row has the same values in `names`."""
    order = np.lexsort([columns[name] for name in reversed(names)])  # stable
    same = np.ones(len(order) - 1, bool)
    for name in names:
        same &= columns[name][order][1:] == columns[name][order][:-1]
    repeats = np.zeros(len(order), bool)
    repeats[order[1:]] = same
    return repeats


def _number_tokens(path, first, columns) -> tuple[np.ndarray, np.ndarray]:
    """Token of every row (int [R]) and, per token, its (turn, step, phase) (int [T, 3])."""
    keys = np.stack([columns["turn"], columns["step"], columns["phase"]], axis=1)
    tokens, rows, token = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    for before, after, row in zip(tokens, tokens[1:], rows[1:], strict=False):
        if before[0] != after[0]:
            continue
        turn, step, phase = after.tolist()
        where = f"{path}:{first + row + 1}: turn {turn}, step {step}"
        check(step == before[1] + 1, f"{where} follows step {before[1]}")
        check(phase >= before[2], f"{where} is prefill after decode")
    return token.reshape(-1), tokens


def _check_complete(path, first, columns, tokens, layers, preamble: _Preamble) -> None:
    """No (step, layer) lacks a slot, and no decode step lacks a layer (a file cut at a row)."""
    cells, rows, counts = np.unique(
        np.stack([columns[name] for name in ("turn", "step", "layer")], axis=1),
        axis=0,
        return_index=True,
        return_counts=True,
    )
    for (_, step, layer), row, count in zip(cells, rows, counts, strict=True):
        if count != preamble.top_k:
            where = f"{path}:{first + row + 1}: step {step}, layer {layer}"
            raise InputError(f"{where} has {count} of {preamble.top_k} slots")
    decode = columns["phase"] == DECODE
    wanted = len(layers) * preamble.top_k
    steps = np.stack([columns["turn"][decode], columns["step"][decode]], axis=1)
    steps, counts = np.unique(steps, axis=0, return_counts=True)
    for (turn, step), count in zip(steps, counts, strict=True):
        where = f"{path}: turn {turn}, decode step {step}"
        check(count == wanted, f"{where} has {count} of {wanted} rows: the file is cut")


def _assemble(columns, weights, layer, layers, token, tokens, preamble) -> RecordedRouting:
    shape = (len(layers), len(tokens), preamble.top_k)
    at = (layer.reshape(-1), token, columns["slot"])

    def place(values, fill, dtype):
        array = np.full(shape, fill, dtype)
        array[at] = values
        return array

    turns, lengths = np.unique(tokens[:, 0], return_counts=True)
    prompts = [int(np.sum((tokens[:, 0] == t) & (tokens[:, 2] == PREFILL))) for t in turns]
    trace = RoutingTrace(
        topk_idx=place(columns["expert"], preamble.num_experts, np.int32),
        topk_weights=None if np.isnan(weights[0]) else place(weights, 0, np.float32),
        num_experts=preamble.num_experts,
        expert_bytes=np.array([preamble.expert_bytes[i] for i in layers.tolist()], np.int64),
        sequence_lengths=lengths.astype(np.int64),
        prompt_lengths=np.array(prompts, np.int64),
        meta={
            "model": pathlib.PurePosixPath(preamble.model).stem,
            "arch": preamble.arch,
            "layers": layers.tolist(),
            "source": MAGIC.removeprefix("# "),
        },
    )
    return RecordedRouting(
        trace=trace,
        residency=place(columns["residency"], -1, np.int8),
        bytes_read=place(columns["expert_bytes"], 0, np.int64),
    )
