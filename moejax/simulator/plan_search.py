"""Chooses a plan by its simulated cost on past steps, and scores it on later ones."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moejax.costmodel.hardware import Machine
from moejax.simulator.plans import FIXED, Plan, candidate_plans
from moejax.simulator.step_times import StepTimes, simulate
from moejax.simulator.workload import Lanes, Workload, make_workload


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One trace, batch size and machine: the chosen plan and the fixed ones on the same steps."""

    chosen: Plan
    times: StepTimes
    fixed: dict[str, StepTimes]

    @property
    def seconds(self) -> float:
        """Mean simulated seconds of a step of the chosen plan."""
        return float(self.times.seconds.mean())

    def over_fixed(self, name: str) -> float:
        """Time of a fixed plan over that of the chosen one."""
        return float(self.fixed[name].seconds.mean()) / self.seconds


def split_steps(lanes: Lanes, **kwargs) -> tuple[Workload, Workload]:
    """(to choose by, to score on): halves of the steps; `kwargs` as of `make_workload`.

    The second half is scored with caches seeded from the first. Inside the first half the same is
    repeated, unless it has fewer than two steps: then those seed and serve.
    """
    steps = lanes.chosen.shape[1]
    half = steps // 2
    quarter = half // 2
    train = make_workload(lanes, slice(0, quarter or half), slice(quarter, half), **kwargs)
    return train, make_workload(lanes, slice(0, half), slice(half, steps), **kwargs)


def choose_plan(
    work: Workload, machine: Machine, *, slots: int, plans: Sequence[Plan] | None = None
) -> Plan:
    """The plan of the least simulated time; the first of equals."""
    plans = candidate_plans() if plans is None else list(plans)
    seconds = [simulate(work, machine, plan, slots=slots).seconds.sum() for plan in plans]
    return plans[int(np.argmin(seconds))]


def run_case(train: Workload, test: Workload, machine: Machine, *, slots: int) -> Case:
    """Chooses on `train`; runs the choice and all fixed plans on `test`."""
    chosen = choose_plan(train, machine, slots=slots)
    fixed = {name: simulate(test, machine, plan, slots=slots) for name, plan in FIXED.items()}
    times = fixed.get(chosen.name) or simulate(test, machine, chosen, slots=slots)
    return Case(chosen=chosen, times=times, fixed=fixed)
