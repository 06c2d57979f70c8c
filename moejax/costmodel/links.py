"""Links as straight lines: a collective of n bytes takes alpha + beta * n seconds.

The model and its fit by least squares are those of FSMoE (arXiv 2501.10714, eq. 1) and HierMoE
(arXiv 2508.09591, section IV-A). The same line, over operations instead of bytes, serves products
of matrices.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moejax.core.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """Seconds of a collective as a function of what one rank sends."""

    alpha_s: float  # start-up
    beta_s_per_byte: float

    def seconds(self, nbytes: float) -> float:
        """Seconds of a transfer of `nbytes`."""
        return self.alpha_s + self.beta_s_per_byte * nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted link and how well it fits.

    Attributes:
        r2: share of the variance of the seconds that the line explains.
        worst_residual: largest difference between line and measurement, as a share of the latter.
    """

    link: Link
    r2: float
    worst_residual: float


def fit_link(nbytes: Sequence[float], seconds: Sequence[float]) -> Fit:
    """The line through measured points; both parameters are at least 0.

    Raises `InputError` for fewer than three points, and where all have the same size.
    """
    x, y = np.asarray(nbytes, np.float64), np.asarray(seconds, np.float64)
    check(x.shape == y.shape, f"{x.size} sizes and {y.size} times do not match")
    check(x.size >= 3, f"a link is fitted to 3 points or more, got {x.size}")
    check(len(set(x.tolist())) > 1, f"all {x.size} points have the same {x[0]:.0f} bytes")
    beta, alpha = np.polyfit(x, y, 1)
    if alpha < 0:
        alpha, beta = 0.0, float(x @ y / (x @ x))
    if beta < 0:
        alpha, beta = float(y.mean()), 0.0
    line = alpha + beta * x
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1.0 - float(((y - line) ** 2).sum()) / spread if spread else 1.0
    return Fit(
        link=Link(alpha_s=float(alpha), beta_s_per_byte=float(beta)),
        r2=r2,
        worst_residual=float(np.max(np.abs(line - y) / y)),
    )
