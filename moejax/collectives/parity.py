"""Parity over ranks: what any one of them held can be made again from the others.

Each rank cuts its data into R - 1 pieces, one for each other rank. Rank p keeps the exclusive or of
the pieces that the others cut for it (stripe p): R - 1 pieces and one of parity, as in a RAID 5, or
1 / (R - 1) more memory. It is what REFT (arXiv 2310.12670) does with snapshots in host memory.
"""

from collections.abc import Mapping

from moejax.collectives.compose import build, every_rank, num_ranks
from moejax.collectives.schedule import Combine, Schedule, Transfer


def xor_parity(axes: Mapping[str, int]) -> Schedule:
    """R - 1 pieces on every rank, one for each other in their order, to one of parity.

    R - 1 steps of one piece: stripe p starts at rank p + 1 and goes round to p, which only takes
    it. Wants at least two ranks. Without rank r, its piece for rank p is the exclusive or of
    stripe p and of the pieces of all others for p.
    """
    ranks = num_ranks(axes)

    def message(step: int, src: int) -> Transfer:
        combine: Combine = "copy" if step == ranks - 2 else "xor"
        return Transfer(src, (src + 1) % ranks, ((src - 1 - step) % ranks,), combine)

    return build(axes, "parity", ranks, [every_rank(ranks, message, s) for s in range(ranks - 1)])
