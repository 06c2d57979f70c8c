"""Lines through measured points."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.costmodel.links import Link, fit_link

SIZES = [2.0**18 * k for k in range(1, 25)]


def test_recovers_the_line_that_made_the_points():
    link = Link(alpha_s=2e-4, beta_s_per_byte=3e-10)
    fit = fit_link(SIZES, [link.seconds(n) for n in SIZES])
    np.testing.assert_allclose(fit.link.alpha_s, 2e-4, rtol=1e-9)
    np.testing.assert_allclose(fit.link.beta_s_per_byte, 3e-10, rtol=1e-9)
    assert fit.r2 > 1 - 1e-12 and fit.worst_residual < 1e-9


def test_says_how_badly_it_fits():
    noise = np.random.default_rng(0).uniform(0.5, 1.5, len(SIZES))
    fit = fit_link(SIZES, [1e-3 + 1e-9 * n * e for n, e in zip(SIZES, noise, strict=True)])
    assert 0.3 < fit.r2 < 0.95 and fit.worst_residual > 0.1


def test_neither_parameter_is_negative():
    assert fit_link([1e6, 2e6, 3e6], [1e-4, 3e-4, 5e-4]).link.alpha_s == 0.0
    assert fit_link([1e6, 2e6, 3e6], [3e-4, 2e-4, 1e-4]).link == Link(
        alpha_s=pytest.approx(2e-4), beta_s_per_byte=0.0
    )


def test_too_few_or_equal_points_are_refused():
    with pytest.raises(InputError, match="3 points or more, got 2"):
        fit_link([1, 2], [1, 2])
    with pytest.raises(InputError, match="all 3 points have the same 5 bytes"):
        fit_link([5, 5, 5], [1, 2, 3])
    with pytest.raises(InputError, match="3 sizes and 2 times"):
        fit_link([1, 2, 3], [1, 2])
