"""Shares of a payload over rails while one is congested and one dies: a controller in simulation.

    python -m experiments.multirail --json=results/multirail.json \
        --shares_plot=results/multirail.png

The rung is *simulated*: rails are straight lines with noise, the controller is the library's
(`moejax.collectives.controller`), and each share vector that it asks for is compiled, as a split
all-reduce over CPU devices, and its sum checked. `t_over_topt` is the median over a phase of the
seconds of its steps over those of the best split of rails known exactly.

`scripts/two_rails.sh` measures two real, rate-limited links between two processes.
"""

import dataclasses
import math
import statistics

import jax
import numpy as np
from absl import flags
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.plot_file import png_of
from moejax.collectives.builders import ring_all_reduce, torus_all_reduce
from moejax.collectives.controller import ControllerConfig, ControllerState, observe, revive, start
from moejax.collectives.rails import PARTS, Shares, best_split
from moejax.collectives.split import RailSplit, Variants, split_all_reduce
from moejax.core.mesh import make_mesh
from moejax.costmodel.links import Link

MIB = flags.DEFINE_integer("mib", 256, "payload of a step in MiB", lower_bound=1)
NOISE = flags.DEFINE_float("noise", 0.05, "standard deviation of log time", lower_bound=0.0)
SEED = flags.DEFINE_integer("noise_seed", 0, "of the noise")
PLOT = flags.DEFINE_string("shares_plot", None, "where to write the shares over time, as PNG")
AXES = {"data": 2, "expert": 4}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps in which rails have these bytes per second; 0 for a dead one."""

    name: str
    steps: int
    rates: tuple[float, ...]


STARTUPS = (5e-6, 5e-6, 50e-6)
PHASES = (
    Phase("calm", 100, (10e9, 6e9, 1e9)),
    Phase("congested", 80, (3e9, 6e9, 1e9)),
    Phase("recovered", 60, (10e9, 6e9, 1e9)),
    Phase("dead", 60, (10e9, 0.0, 1e9)),
    Phase("back", 60, (10e9, 6e9, 1e9)),
)


def links_of(phase: Phase) -> list[Link | None]:
    """The rails as they are; None for a dead one."""
    return [
        Link(alpha_s=alpha, beta_s_per_byte=1 / rate) if rate else None
        for alpha, rate in zip(STARTUPS, phase.rates, strict=True)
    ]


def step_seconds(
    links: list[Link | None], shares: Shares, nbytes: float, noise: np.ndarray
) -> list[float]:
    """What each rail takes for its share; infinite on a dead one."""
    seconds = []
    for link, share, factor in zip(links, shares, noise, strict=True):
        exact = math.inf if link is None else link.seconds(nbytes * share / PARTS)
        seconds.append(exact * factor if share else 0.0)
    return seconds


def simulate(nbytes: float, noise: float, seed: int) -> list[dict]:
    """One record per step: phase, shares, seconds over the best possible.

    A step on a dying rail is repeated by the others: it counts what they take for it, again.
    """
    rng, cfg = np.random.default_rng(seed), ControllerConfig()
    believed = [link for link in links_of(PHASES[0]) if link is not None]
    state: ControllerState = start(believed, nbytes)
    records = []
    for phase in PHASES:
        links = links_of(phase)
        alive = [link for link in links if link is not None]
        best = best_split(alive, nbytes).seconds
        for rail, link in enumerate(links):
            if link is not None and state.failed[rail]:
                state = revive(state, rail, link, nbytes)
        for _ in range(phase.steps):
            factors = np.exp(rng.normal(0, noise, len(links)))
            shares = state.shares
            took = step_seconds(links, shares, nbytes, factors)
            state = observe(state, took, nbytes, cfg)
            finite = max(one for one in took if not math.isinf(one))
            if math.inf in took:
                finite += max(step_seconds(links, state.shares, nbytes, factors))
            records.append({"phase": phase.name, "shares": shares, "ratio": finite / best})
    return records


def compile_split(shares: Shares):
    """An all-reduce over 8 devices by these shares, checked once."""
    rings = ring_all_reduce(AXES), ring_all_reduce(AXES, -1), torus_all_reduce(AXES)
    split = RailSplit(rings, shares)
    mesh, spec = make_mesh(**AXES), P(tuple(AXES))
    fn = jax.shard_map(
        lambda x: split_all_reduce(split, x), mesh=mesh, in_specs=spec, out_specs=spec
    )
    x = np.arange(8 * 1600, dtype=np.float32).reshape(8, 1600) % 64
    run = jax.jit(fn)
    if not (np.asarray(run(x)) == x.sum(0)).all():
        raise RuntimeError(f"a split by {shares} sums wrongly")
    return run


def draw(records: list[dict], path: str) -> None:
    """Shares over time, phases marked."""

    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    shares = np.array([record["shares"] for record in records])
    axes.stackplot(range(len(shares)), shares.T, labels=[f"rail {r}" for r in range(3)], step="mid")
    begin = 0
    for phase in PHASES:
        axes.axvline(begin, color="black", linewidth=0.8)
        axes.text(begin + 2, PARTS + 0.3, phase.name, fontsize=8)
        begin += phase.steps
    axes.set(xlabel="step", ylabel="sixteenths", ylim=(0, PARTS + 1.5), xlim=(0, len(shares) - 1))
    axes.legend(loc="lower right", fontsize=8)
    cli.write_bytes(path, png_of(figure, tight=True))


def main() -> None:
    cli.check_writable(cli.JSON.value)
    cli.check_writable(PLOT.value)
    cli.use_cpu_devices(8)
    records = simulate(MIB.value * 2**20, NOISE.value, SEED.value)
    variants = Variants(compile_split)
    for record in records:
        variants.get(record["shares"])
    ratios = {
        phase.name: statistics.median(r["ratio"] for r in records if r["phase"] == phase.name)
        for phase in PHASES
    }
    table = Table("phase", "median T / T_opt", "last shares")
    for name, ratio in ratios.items():
        last = [r["shares"] for r in records if r["phase"] == name][-1]
        table.add_row(name, f"{ratio:.3f}", str(last))
    Console().print(table)
    figures = {
        "t_over_topt": ratios,
        "compiled_variants": variants.count,
        "shares": [list(record["shares"]) for record in records],
        "phases": {phase.name: list(phase.rates) for phase in PHASES},
        "payload_bytes": MIB.value * 2**20,
        "noise": NOISE.value,
    }
    cli.write_report("multirail", "simulated", figures)
    if PLOT.value:
        draw(records, PLOT.value)


if __name__ == "__main__":
    cli.run(main)
