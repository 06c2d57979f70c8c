"""Is an offloaded model the resident one, to the bit? Every budget, batch and way to serve.

    python -m experiments.offload_exactness --json=results/offload_exactness.json

A small random decoder (4 MoE layers, 16 experts, 4 per token) reads the same text with all experts
on one device and from host memory: one device and two ranks, slots for one expert per layer up to
all, fetched, prefetched, computed by the host and divided. Its routing is its own, or adversarial:
consecutive tokens share no expert. Logits of the prefill and of every token are compared. Ways
that keep all work on the device run under every budget, the others under the smallest one, on two
ranks. On CPU all must be equal; a case that is not ends the run with status 1. On GPU and TPU
fetching must be, and what the host computes agrees to 1e-5 of the largest logit. Programs for CPU
are compiled at XLA's lowest level, in a third of the time.
"""

import itertools
import sys
from functools import partial
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import cli
from experiments.offload_steps import exactness
from moejax.core.compat import cheap_cpu_options
from moejax.core.errors import check

SEQUENCES = flags.DEFINE_list("batch_sizes", ["1", "4", "16", "64"], "sequences side by side")
WAYS = flags.DEFINE_list("ways", list(exactness.WAYS), "ways to serve a miss, of the default")
RANKS = flags.DEFINE_list("ranks", ["1", "2"], "ranks that share the experts")
SIZE = {"prompt": 8, "new": 24}  # tokens of each sequence
TOLERANCE = 1e-5  # of the largest logit, where the host is another processor


def main() -> None:
    batches = cli.read_counts(SEQUENCES)
    ranks = cli.read_counts(RANKS)
    unknown = [way for way in WAYS.value if way not in exactness.WAYS]
    known = ", ".join(exactness.WAYS)
    check(bool(WAYS.value) and not unknown, f"--ways={','.join(WAYS.value)} is not of {known}")
    cli.use_cpu_devices(max(ranks))
    check(
        len(jax.devices()) >= max(ranks),
        f"--ranks={max(ranks)} wants as many devices, here are {len(jax.devices())}",
    )
    on_cpu = jax.default_backend() == "cpu"
    jit = partial(jax.jit, compiler_options=cheap_cpu_options(0, exact=True)) if on_cpu else jax.jit
    cases = []
    for batch in batches:
        model = exactness.make_model(batch, **SIZE)
        forced = exactness.adversarial(batch, **SIZE)
        resident: dict[exactness.Routed, exactness.Run] = {
            "own": exactness.run_resident(model, None, jit=jit),
            "adversarial": exactness.run_resident(model, forced, jit=jit),
        }
        todo = [case for way in WAYS.value for case in cases_of(way, batch, ranks)]
        for case in track(todo, f"batch {batch}"):
            cases.append(exactness.check_case(model, case, resident, jit=jit))
    show(cases)
    wrong = [case for case in cases if not is_right(case)]
    report = {
        "cases": 2 * len(cases),
        "equal": sum(one["equal"] for case in cases for one in case["routed"].values()),
        "wrong": len(wrong),
        "each": cases,
    }
    cli.write_report("offload_exactness", "numerics", report)
    if wrong:
        print(f"{len(wrong)} cases are not the resident model: {wrong[0]}", file=sys.stderr)
        sys.exit(1)


def cases_of(way: str, batch: int, ranks: list[int]) -> list[exactness.Case]:
    """The docstring's choice: every budget and number of ranks, or the least and the most."""
    whole = "serve" not in exactness.WAYS[way]
    budgets, ranks = (exactness.BUDGETS, ranks) if whole else (exactness.BUDGETS[:1], ranks[-1:])
    return [
        exactness.Case(way=way, ranks=n, batch=batch, budget=budget)
        for n, budget in itertools.product(ranks, budgets)
    ]


def is_right(case: dict[str, Any]) -> bool:
    """Equal to the bit; to rounding where another processor than the device computed."""
    apart = jax.default_backend() != "cpu" and exactness.WAYS[case["way"]].get("serve")
    bound = TOLERANCE if apart else 0.0
    return all(one["relative_difference"] <= bound for one in case["routed"].values())


def show(cases: list[dict[str, Any]]) -> None:
    """A row for every way and budget, over batches and ranks."""
    columns = ("way", "budget", "cases", "equal", "hits: own", "hits: adversarial", "difference")
    table, groups = Table(*columns), {}
    for case in cases:
        groups.setdefault((case["way"], case["budget"]), []).append(case)
    for (way, budget), group in groups.items():
        runs = [case["routed"] for case in group]
        both = [one for run in runs for one in run.values()]
        rates = {name: [run[name]["hit_rate"] for run in runs] for name in ("own", "adversarial")}
        table.add_row(
            way,
            budget,
            str(len(both)),
            str(sum(one["equal"] for one in both)),
            *(f"{min(rate):.2f} to {max(rate):.2f}" for rate in rates.values()),
            f"{max(one['relative_difference'] for one in both):.1e}",
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    cli.run(main)
