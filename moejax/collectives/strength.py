"""How strongly to compress over each link: more where it is slow.

Two rules for the density of top-k, the share of elements that are sent: FusionLLM's (AdaTopK,
arXiv 2410.12707) and that of bandwidth-aware federated learning (BCRS, arXiv 2408.14736).
"""

from collections.abc import Mapping

from moejax.core.errors import check
from moejax.costmodel.links import Link

INDEX_OVERHEAD = 3  # AdaTopK's allowance for places beside values


def adaptive_densities(seconds: Mapping[str, float], ratio: float) -> dict[str, float]:
    """AdaTopK: link i is compressed max(1, 3 ratio R_i / max R) times.

    Args:
        seconds: R_i, what the uncompressed transfer takes over each link.
        ratio: how many times fewer bytes the slowest link is to carry, places included.

    >>> adaptive_densities({"data": 8.0, "expert": 0.1}, 10)
    {'data': 0.03333333333333333, 'expert': 1.0}
    """
    check(ratio >= 1, f"ratio={ratio} must be at least 1")
    check(min(seconds.values(), default=0) > 0, f"seconds={dict(seconds)} must be positive")
    slowest = max(seconds.values())
    return {
        link: 1 / max(1.0, INDEX_OVERHEAD * ratio * one / slowest) for link, one in seconds.items()
    }


def balanced_densities(
    links: Mapping[str, Link], nbytes: float, density: float
) -> dict[str, float]:
    """BCRS: every link sends as much as it can in the time that the slowest needs at `density`.

    Args:
        links: one per sender.
        nbytes: of the uncompressed message; a value and its place take twice its share.

    Densities are at most 1 and those of the slowest links `density`.
    """
    check(0 < density <= 1, f"density={density} must be in (0, 1]")
    check(nbytes > 0, f"nbytes={nbytes} must be positive")
    deadline = max(link.seconds(2 * nbytes * density) for link in links.values())
    return {
        name: min(1.0, (deadline - link.alpha_s) / (2 * nbytes * link.beta_s_per_byte))
        if link.beta_s_per_byte
        else 1.0
        for name, link in links.items()
    }
