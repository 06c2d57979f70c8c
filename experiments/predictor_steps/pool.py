"""Figures of all folds as one: every fold weighs as many tokens as it held out."""

from typing import Any

import numpy as np

from experiments.predictor_steps.fold import Fold

BY_SIZE = ("recall", "wasted_bytes", "token_coverage", "coverage_error", "hot_rank", "weight_mass")


def pool(folds: list[Fold]) -> dict[str, Any]:
    """Means over target layers, {figure: {predictor: {horizon: {m}}}}, and recall@k by layer.

    `exact_set` has no m. `recall_of_folds` {predictor: {horizon: [folds]}} is recall@k, unpooled.
    A figure that no fold has (`weight_mass` without weights) is left out.
    """
    weights = np.array([fold.tokens for fold in folds], float)
    names = {name: list(by) for name, by in folds[0].figures.items()}

    def each(name: str, horizon: str, field: str) -> list[Any]:
        return [fold.figures[name][horizon][field] for fold in folds]

    def by_layer(rows: list[list[float]]) -> np.ndarray:
        return np.average(np.array(rows), axis=0, weights=weights)

    def by_size(name: str, horizon: str, field: str) -> dict[str, float]:
        sizes = each(name, horizon, field)
        return {m: round(float(by_layer([size[m] for size in sizes]).mean()), 6) for m in sizes[0]}

    def table(of: Any) -> dict[str, Any]:
        return {name: {h: of(name, h) for h in horizons} for name, horizons in names.items()}

    def at_k(name: str, horizon: str) -> list[list[float]]:
        return [next(iter(sizes.values())) for sizes in each(name, horizon, "recall")]

    pooled = {field: table(lambda n, h, f=field: by_size(n, h, f)) for field in BY_SIZE}
    if not any(pooled["weight_mass"][name][h] for name, hs in names.items() for h in hs):
        del pooled["weight_mass"]
    pooled["exact_set"] = table(
        lambda n, h: round(float(by_layer(each(n, h, "exact_set")).mean()), 6)
    )
    pooled["recall_by_layer"] = table(lambda n, h: [round(x, 6) for x in by_layer(at_k(n, h))])
    pooled["recall_of_folds"] = table(
        lambda n, h: [round(float(np.mean(row)), 6) for row in at_k(n, h)]
    )
    return pooled
