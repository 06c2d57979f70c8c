"""Three processes, one of which is killed at ten moments: who goes on, how soon, and to what end.

    python -m experiments.faults --json=results/faults.json

The moments are drawn from `--seed`: at the start, in a step, after it, while a checkpoint is
written, and when the process had just come back after a first death. The others must end with the
state of an unkilled run, or, where it was process 0, say why they end and leave a checkpoint that
leads there. Rung *numerics*; the seconds are of this machine.
"""

import pathlib
import tempfile
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import cli
from experiments.fault_steps.moments import STEPS, Outcome, draw_moments, run_moment
from experiments.fault_steps.problem import difference, three, train_step, unkilled
from moejax.elastic.alive import run_alive
from moejax.elastic.watchdog import EXIT_STUCK

SEED = flags.DEFINE_integer("seed", 0, "of the ten moments", lower_bound=0)


def judge(outcome: Outcome, victim: int) -> dict[str, Any]:
    """Figures of one moment; `holds` says whether all went as promised."""
    states, (step, saved) = unkilled(outcome.steps), outcome.saved
    apart = [difference(saved, states[step])]
    if victim:
        went_on = sorted(outcome.results) == sorted(outcome.codes)
        apart += [difference(one["state"], states[-1]) for one in outcome.results.values()]
        seconds = [max(one["seconds"][1:]) for one in outcome.results.values()]
    else:
        went_on, seconds = _said_why(outcome), []
        last = run_alive(jax.devices(), saved, train_step, STEPS, first_step=step, live=three)
        apart.append(difference(last, states[-1]))
    longest = max(seconds, default=None)
    return {
        "others": "went on" if victim else "ended, resumed from their checkpoint",
        "newest_checkpoint": step,
        "longest_step_s": longest,
        "largest_difference": max(apart),
        "holds": went_on and max(apart) <= 1e-5 and (longest is None or longest <= 10),
    }


def _said_why(outcome: Outcome) -> bool:
    """Whether those whose coordinator died have ended, and with its message."""
    ended = all(code not in (0, EXIT_STUCK) for code in outcome.codes.values())
    told = ["coordination service" in text.lower() for text in outcome.outputs.values()]
    return ended and all(told)


def main() -> None:
    cli.check_writable(cli.JSON.value)
    cli.use_cpu_devices(3)
    table = Table("moment", "victim", "others", "longest step s", "largest difference", "holds")
    moments: dict[str, dict[str, Any]] = {}
    drawn = list(enumerate(draw_moments(SEED.value), 1))
    for number, (moment, victim) in track(drawn, description="dying", transient=True):
        with tempfile.TemporaryDirectory() as folder:
            found = judge(run_moment(pathlib.Path(folder), moment, victim), victim)
        moments[f"{number}: {moment}, process {victim}"] = found
        longest = found["longest_step_s"]
        table.add_row(
            moment, str(victim), found["others"], "" if longest is None else f"{longest:.1f}",
            f"{found['largest_difference']:.1e}", "yes" if found["holds"] else "no",
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 110).print(table)
    figures = {"survived": sum(one["holds"] for one in moments.values()), "moments": moments}
    cli.write_report("faults", "numerics", figures)


if __name__ == "__main__":
    cli.run(main)
