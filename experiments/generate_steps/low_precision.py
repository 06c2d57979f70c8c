"""Misses in few bits: a lossy way to move less, which every report names."""

import dataclasses
from typing import Any

from moejax.core.errors import check
from moejax.interop.load import LoadedModel
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.quantized import Format
from moejax.offload.precision import in_two_precisions

THRESHOLD = 0.6


def check_flags(
    format: Format | None,
    threshold: float | None,
    *,
    in_host: bool,
    experts_dtype: Format | None,
) -> None:
    """Refuses flags that do not go together; `in_host` says that a budget keeps experts there."""
    check(
        threshold is None or format is not None,
        f"--importance_threshold={threshold} wants --low_precision_misses: which of them it makes",
    )
    if format is None:
        return
    check(
        in_host,
        f"--low_precision_misses={format} wants a --device_budget and experts in host memory",
    )
    check(
        experts_dtype is None,
        f"--low_precision_misses={format} wants full experts, not --experts_dtype={experts_dtype}",
    )


def use(model: LoadedModel, format: Format | None, threshold: float | None) -> LoadedModel:
    """`model` with a copy of its experts in `format` beside them; itself where that is None."""
    if format is None:
        return model
    assert isinstance(model.experts, GatedWeights) and model.offload is not None
    threshold = THRESHOLD if threshold is None else threshold
    return dataclasses.replace(
        model,
        experts=in_two_precisions(model.experts, format),
        offload=dataclasses.replace(model.offload, importance_threshold=threshold),
    )


def about(format: Format | None, threshold: float | None) -> dict[str, Any]:
    """What a report says of it; nothing where `format` is None."""
    if format is None:
        return {}
    return {
        "low_precision_misses": format,
        "importance_threshold": THRESHOLD if threshold is None else threshold,
        "outputs": f"lossy: of misses in {format} where their router weight is small",
    }
