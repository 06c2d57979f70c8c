"""How many chunks a pipelined dispatch should have: FSMoE's model (arXiv 2501.10714, section 4).

Each of r chunks is dispatched (all-to-all), gathered, computed, scattered and combined (all-to-all
again). Three resources work at the same time: links between nodes, links inside a node, the device.
An operation on a chunk takes alpha + beta * n / r, so chunks hide one resource behind another and
pay every start-up r times. FSMoE solves four cases in closed form; playing the schedule is simpler
and never later than these.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from moejax.core.errors import check

Resource = Literal["between", "inside", "device"]
STAGES: tuple[tuple[str, Resource], ...] = (
    ("dispatch", "between"),
    ("gather", "inside"),
    ("experts", "device"),
    ("scatter", "inside"),
    ("combine", "between"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation of the layer: `alpha_s` a chunk, and `work_s` for all of it together."""

    alpha_s: float = 0.0
    work_s: float = 0.0

    def seconds(self, num_chunks: int) -> float:
        """Of one of `num_chunks` chunks."""
        return self.alpha_s + self.work_s / num_chunks


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """The five operations of an expert layer; absent ones take no time."""

    dispatch: Operation
    experts: Operation
    combine: Operation
    gather: Operation = Operation()
    scatter: Operation = Operation()


def pipelined_seconds(times: LayerTimes, num_chunks: int) -> float:
    """Seconds of the layer in `num_chunks` chunks.

    A free resource takes the operation that has been ready longest; of equals, that of the earlier
    stage, so that dispatches go before combines.
    """
    check(num_chunks >= 1, f"num_chunks={num_chunks} must be at least 1")
    seconds = [getattr(times, name).seconds(num_chunks) for name, _ in STAGES]
    free: dict[Resource, float] = {"between": 0.0, "inside": 0.0, "device": 0.0}
    waiting = [(0.0, 0, chunk) for chunk in range(num_chunks)]  # ready at, stage, chunk
    end = 0.0
    while waiting:

        def start(one: tuple[float, int, int]) -> tuple[float, float, int, int]:
            return (max(one[0], free[STAGES[one[1]][1]]), *one)

        ready, stage, chunk = chosen = min(waiting, key=start)
        waiting.remove(chosen)
        done = start(chosen)[0] + seconds[stage]
        free[STAGES[stage][1]] = done
        end = max(end, done)
        if stage + 1 < len(STAGES):
            waiting.append((done, stage + 1, chunk))
    return end


def closed_form_seconds(times: LayerTimes, num_chunks: int) -> float:
    """FSMoE's four cases (section 4.2), without a gradient all-reduce.

    They suppose that dispatch and combine take equally long.
    """
    r = num_chunks
    exchange, experts = times.dispatch.seconds(r), times.experts.seconds(r)
    gather, scatter = times.gather.seconds(r), times.scatter.seconds(r)
    bound_by_experts = 2 * exchange + gather + scatter + r * experts
    if exchange > gather:
        if r * experts > 2 * (r - 1) * exchange:
            return bound_by_experts
        return 2 * r * exchange + gather + scatter
    if r * experts > (r - 1) * (gather + scatter):
        return bound_by_experts
    return 2 * exchange + r * gather + r * scatter


def choose_chunks(
    times: LayerTimes, candidates: Sequence[int] = (1, 2, 3, 4, 6, 8)
) -> tuple[int, dict[int, float]]:
    """The fastest number of chunks by trying all, and the seconds of each candidate."""
    check(len(candidates) > 0, "there is no candidate for num_chunks")
    seconds = {r: pipelined_seconds(times, r) for r in candidates}
    return min(seconds, key=lambda r: seconds[r]), seconds
