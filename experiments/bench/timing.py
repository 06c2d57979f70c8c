"""How benchmarks measure: arms interleaved in one process, medians, minima, spread."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import jax
from absl import flags
from rich.progress import track

ROUNDS = flags.DEFINE_integer("rounds", 20, "interleaved calls per arm", lower_bound=3)


def interleave(
    arms: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every call, arm by arm, in turns, so that a noisy minute hits all of them.

    An arm returns arrays; their completion is waited for inside the timing.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    silent = not sys.stdout.isatty()  # blank lines are all that a file would get of a bar
    for i in track(range(warmup + rounds), "measuring", transient=True, disable=silent):
        for name, run in arms.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            if i >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, minimum, and the spread between the quartiles."""
    quarter = statistics.quantiles(seconds, n=4)
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "quartile_spread_ms": 1e3 * (quarter[2] - quarter[0]),
    }
