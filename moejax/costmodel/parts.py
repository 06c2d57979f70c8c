"""An expert moved in parts: gate, up and down, each with a transfer of its own.

AsyncIO of PreScope (arXiv 2509.23638) moves the three matrices apart. The device multiplies by what
has landed while the rest travels, so only the last part's arithmetic stays behind the link; a
transfer that must not be interrupted holds others up for a part, not for an expert; and the landing
buffer of the last stage is a part's.
"""

from collections.abc import Sequence

from moejax.core.errors import check


def landed_s(fetch_s: Sequence[float], compute_s: Sequence[float]) -> float:
    """When the device is done with an expert whose parts arrive one after another.

    Args:
        fetch_s: seconds on the link of each part, in order. compute_s: of its arithmetic.

    >>> landed_s([3.0], [1.5]), landed_s([1.0, 1.0, 1.0], [0.5, 0.5, 0.5])
    (4.5, 3.5)
    """
    check(len(fetch_s) == len(compute_s), f"{len(fetch_s)} transfers, {len(compute_s)} products")
    arrived = done = 0.0
    for fetch, compute in zip(fetch_s, compute_s, strict=True):
        arrived += fetch
        done = max(done, arrived) + compute
    return done


def equal_parts_s(fetch_s: float, compute_s: float, parts: int) -> float:
    """`landed_s` of `parts` equal parts: max(tau + g / p, tau / p + g)."""
    check(parts >= 1, f"parts={parts} must be at least 1")
    return max(fetch_s + compute_s / parts, fetch_s / parts + compute_s)


def parts_sent(window_s: float, fetch_s: float, parts: int) -> int:
    """Parts whose transfer starts within a window; the last one may end after it."""
    check(parts >= 1, f"parts={parts} must be at least 1")
    if window_s <= 0:
        return 0
    quantum = fetch_s / parts
    started = int(window_s / quantum)
    return started + (window_s - started * quantum > 1e-9 * quantum)
