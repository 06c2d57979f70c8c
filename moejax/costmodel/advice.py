"""From a calibrated machine and a layer to a dispatch: how many levels, how many chunks, and why.

Levels are chosen by HierMoE's model (`hierarchy`), then chunks by FSMoE's (`pipeline`), each by
trying all candidates. `scripts/calibrate.py` measures and writes the file that is read here.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from moejax.core.errors import InputError, check
from moejax.costmodel.hierarchy import Choice, Level, choose_levels, level_rows, touched_share
from moejax.costmodel.links import Link
from moejax.costmodel.pipeline import LayerTimes, Operation, choose_chunks

CHUNKS = (1, 2, 3, 4, 6, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """An expert layer as its links see it."""

    tokens: int  # of one rank
    num_experts: int
    top_k: int
    d_model: int
    d_ff: int
    value_bytes: int = 4

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            check(value >= 1, f"{name}={value} must be at least 1")
        check(
            self.top_k <= self.num_experts,
            f"top_k={self.top_k} exceeds num_experts={self.num_experts}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a machine was measured to cost.

    Attributes:
        sizes: ranks on each mesh axis that was calibrated, outermost first.
        exchange: an all-to-all over each level.
        product: seconds of a product as a line over its operations.
    """

    sizes: dict[str, int]
    exchange: dict[Level, Link]
    product: Link


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """The fastest dispatch, and what the model says about all others."""

    choice: Choice
    num_chunks: int
    seconds_by_chunks: dict[int, float]  # of a layer's forward pass

    def explain(self) -> str:
        """Two lines for people: all candidates and their predicted times."""
        chunks = ", ".join(f"{r}: {1e3 * s:.3f} ms" for r, s in self.seconds_by_chunks.items())
        return f"{self.choice.explain()}\nchunks {self.num_chunks} of {chunks}"

    def figures(self) -> dict[str, Any]:
        """The same for a report."""
        return {
            "num_levels": len(self.choice.levels),
            "levels": self.choice.explain(),
            "num_chunks": self.num_chunks,
            "seconds_by_chunks": {str(r): s for r, s in self.seconds_by_chunks.items()},
        }


def advise(found: Calibration, layer: LayerShape) -> Advice:
    """The number of levels and of chunks with the least predicted time, for uniform routing."""
    ranks = [math.prod(list(found.sizes.values())[: i + 1]) for i in range(len(found.sizes))]
    shares = {u: touched_share(layer.num_experts, layer.top_k, u) for u in ranks}
    row_bytes = layer.value_bytes * layer.d_model
    choice = choose_levels(
        found.sizes, found.exchange, tokens=layer.tokens, row_bytes=row_bytes, shares=shares
    )
    rows = level_rows(choice.levels, found.sizes, tokens=layer.tokens, shares=shares)
    moved = [found.exchange[level] for level in choice.levels]
    work = [
        link.beta_s_per_byte * count * row_bytes for link, count in zip(moved, rows, strict=True)
    ]
    dispatch = Operation(alpha_s=sum(link.alpha_s for link in moved), work_s=sum(work))
    operations = 6.0 * layer.tokens * layer.top_k * layer.d_model * layer.d_ff
    experts = Operation(
        alpha_s=3 * found.product.alpha_s, work_s=found.product.beta_s_per_byte * operations
    )
    times = LayerTimes(dispatch=dispatch, experts=experts, combine=dispatch)
    divisors = [r for r in CHUNKS if layer.tokens % r == 0]
    num_chunks, seconds = choose_chunks(times, divisors)
    return Advice(choice=choice, num_chunks=num_chunks, seconds_by_chunks=seconds)


def read_calibration(path: str | os.PathLike) -> Calibration:
    """Of the JSON that `scripts/calibrate.py` wrote; raises `InputError` for any other file."""
    try:
        figures = json.loads(pathlib.Path(path).read_text())["figures"]
        return _calibration(figures)
    except OSError as error:
        raise InputError(f"cannot read calibration {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = str(error) if isinstance(error, InputError) else "its figures are not there"
        raise InputError(f"{path} is not the output of scripts.calibrate: {what}") from error


def _calibration(figures: Mapping[str, Any]) -> Calibration:
    alphas, betas = figures["alpha_s"], figures["beta_s_per_byte"]

    def link(name: str) -> Link:
        alpha, beta = float(alphas[name]), float(betas[name])
        good = 0 <= alpha < math.inf and 0 <= beta < math.inf
        check(good, f"{name} costs alpha={alpha}, beta={beta}, not finite and >= 0")
        return Link(alpha_s=alpha, beta_s_per_byte=beta)

    prefix = "all_to_all."
    levels = [name.removeprefix(prefix) for name in alphas if name.startswith(prefix)]
    sizes = {str(axis): int(size) for axis, size in figures["sizes"].items()}
    check(len(levels) > 0 and len(sizes) > 0, "it has no level")
    check(all(size >= 1 for size in sizes.values()), f"its mesh is {sizes}")
    return Calibration(
        sizes=sizes,
        exchange={tuple(level.split("+")): link(prefix + level) for level in levels},
        product=link("product"),
    )
