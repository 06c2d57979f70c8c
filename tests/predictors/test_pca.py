"""Compression: unit variance, no correlation, the widest directions first."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.predictors.mlp import select
from moejax.predictors.pca import compress, fit_compression


def stretched(rng, layers=2, tokens=400, dims=6):
    """Data whose widest direction is a known one."""
    turn = np.linalg.qr(rng.normal(size=(dims, dims)))[0]
    scale = np.array([5.0, 2.0, 1.0, 0.5, 0.2, 0.0])
    data = rng.normal(size=(layers, tokens, dims)) * scale @ turn.T + 3
    return data.astype(np.float32), turn


def test_components_are_uncorrelated_with_unit_variance():
    data, turn = stretched(np.random.default_rng(0))
    params, kept = fit_compression(data, 3)
    for layer in range(2):
        small = np.asarray(compress(select(params, layer), data[layer]))
        np.testing.assert_allclose(small.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(small.T @ small / len(small), np.eye(3), atol=1e-3)
        first = np.asarray(params.basis[layer, :, 0])
        assert abs(first @ turn[:, 0]) / np.linalg.norm(first) > 0.99
    np.testing.assert_allclose(kept, 30 / 30.29, atol=0.01)


def test_a_direction_without_variance_stays_finite():
    data, _ = stretched(np.random.default_rng(0))
    params, kept = fit_compression(data, 6)
    assert np.isfinite(params.basis).all()
    np.testing.assert_allclose(kept, 1)


def test_too_many_components():
    data, _ = stretched(np.random.default_rng(0))
    with pytest.raises(InputError, match="components=7 must be between 1 and the 6 dims"):
        fit_compression(data, 7)
