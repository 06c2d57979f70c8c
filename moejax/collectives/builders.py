"""Every builder by name, and the operation that it is proven to do.

All take `axes`, names and sizes from the outermost (slowest) inwards, such as
`{"data": 2, "expert": 4}`, and work for any number of ranks or raise `InputError`.
"""

import dataclasses
from collections.abc import Callable, Mapping

from moejax.collectives.compose import native as native
from moejax.collectives.doubling import doubling_all_gather as doubling_all_gather
from moejax.collectives.doubling import doubling_broadcast as doubling_broadcast
from moejax.collectives.doubling import halving_doubling_all_reduce as halving_doubling_all_reduce
from moejax.collectives.doubling import halving_reduce_scatter as halving_reduce_scatter
from moejax.collectives.doubling import (
    recursive_doubling_all_reduce as recursive_doubling_all_reduce,
)
from moejax.collectives.exchanges import shifted_all_to_all as shifted_all_to_all
from moejax.collectives.exchanges import shifted_round_trip as shifted_round_trip
from moejax.collectives.exchanges import two_level_all_to_all as two_level_all_to_all
from moejax.collectives.parity import xor_parity as xor_parity
from moejax.collectives.rings import bidirectional_ring_all_reduce as bidirectional_ring_all_reduce
from moejax.collectives.rings import direct_all_reduce as direct_all_reduce
from moejax.collectives.rings import hierarchical_all_gather as hierarchical_all_gather
from moejax.collectives.rings import hierarchical_all_reduce as hierarchical_all_reduce
from moejax.collectives.rings import hierarchical_reduce_scatter as hierarchical_reduce_scatter
from moejax.collectives.rings import ring_all_gather as ring_all_gather
from moejax.collectives.rings import ring_all_reduce as ring_all_reduce
from moejax.collectives.rings import ring_reduce_scatter as ring_reduce_scatter
from moejax.collectives.rings import torus_all_reduce as torus_all_reduce
from moejax.collectives.schedule import Operation, Schedule


@dataclasses.dataclass(frozen=True)
class Builder:
    """How to make a schedule, and what it does."""

    build: Callable[[Mapping[str, int]], Schedule]
    operation: Operation
    power_of_two: bool = False  # refuses other numbers of ranks
    num_axes: int | None = None  # refuses other numbers of axes


BUILDERS: dict[str, Builder] = {
    "ring_reduce_scatter": Builder(ring_reduce_scatter, "reduce_scatter"),
    "ring_all_gather": Builder(ring_all_gather, "all_gather"),
    "ring_all_reduce": Builder(ring_all_reduce, "all_reduce"),
    "bidirectional_ring_all_reduce": Builder(bidirectional_ring_all_reduce, "all_reduce"),
    "direct_all_reduce": Builder(direct_all_reduce, "all_reduce"),
    "hierarchical_reduce_scatter": Builder(hierarchical_reduce_scatter, "reduce_scatter"),
    "hierarchical_all_gather": Builder(hierarchical_all_gather, "all_gather"),
    "hierarchical_all_reduce": Builder(hierarchical_all_reduce, "all_reduce"),
    "torus_all_reduce": Builder(torus_all_reduce, "all_reduce"),
    "halving_doubling_all_reduce": Builder(halving_doubling_all_reduce, "all_reduce"),
    "recursive_doubling_all_reduce": Builder(recursive_doubling_all_reduce, "all_reduce"),
    "halving_reduce_scatter": Builder(halving_reduce_scatter, "reduce_scatter", power_of_two=True),
    "doubling_all_gather": Builder(doubling_all_gather, "all_gather", power_of_two=True),
    "doubling_broadcast": Builder(doubling_broadcast, "broadcast"),
    "shifted_all_to_all": Builder(shifted_all_to_all, "all_to_all"),
    "two_level_all_to_all": Builder(two_level_all_to_all, "all_to_all", num_axes=2),
    "shifted_round_trip": Builder(shifted_round_trip, "round_trip"),
    "xor_parity": Builder(xor_parity, "parity"),
}
