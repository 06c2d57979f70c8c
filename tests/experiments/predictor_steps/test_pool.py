"""Folds are pooled by the tokens that they held out."""

from experiments.predictor_steps.fold import Fold
from experiments.predictor_steps.pool import pool


def fold(tokens: int, value: float) -> Fold:
    """One predictor at one horizon, two target layers, every figure `value` and twice that."""
    layers = [value, 2 * value]
    sizes = {"2": layers, "4": [2 * value, 4 * value]}
    one = {name: sizes for name in ("recall", "wasted_bytes", "token_coverage", "hot_rank")}
    one |= {"coverage_error": sizes, "weight_mass": {}, "exact_set": layers}
    return Fold(tokens=tokens, steps=1, secs=1.0, tried={}, figures={"history": {"1": one}})


def test_a_fold_weighs_its_tokens():
    got = pool([fold(100, 0.1), fold(300, 0.2)])
    mean = (100 * 0.1 + 300 * 0.2) / 400  # of the first layer; the second has twice that
    assert got["recall"] == {"history": {"1": {"2": round(1.5 * mean, 6), "4": round(3 * mean, 6)}}}
    assert got["exact_set"] == {"history": {"1": round(1.5 * mean, 6)}}
    assert got["recall_by_layer"] == {"history": {"1": [round(mean, 6), round(2 * mean, 6)]}}
    assert got["recall_of_folds"] == {"history": {"1": [0.15, 0.3]}}
    assert "weight_mass" not in got
