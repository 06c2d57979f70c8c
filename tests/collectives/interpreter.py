"""What a schedule computes, in numpy, one message at a time; it proves nothing and refuses nothing.

`random_schedule` makes irregular ones, `mutate` spoils a good one.
"""

import contextlib
import dataclasses
import operator

import numpy as np

from moejax.collectives.check import simulate
from moejax.collectives.schedule import Combine, Schedule, Step, Transfer
from moejax.core.errors import InputError

FUNCTIONS = {"add": operator.add, "max": np.maximum, "xor": operator.xor}


def interpret(schedule: Schedule, x: np.ndarray) -> np.ndarray:
    """Rows [R, end chunks, ...] of x [R, start chunks, ...]; what nobody put there is no number."""
    held = [dict(zip(chunks, rows, strict=True)) for chunks, rows in zip(schedule.start, x)]  # noqa: B905
    nothing = np.array(np.nan, object)[()] if x.dtype == object else None
    for step in schedule.steps:
        sent = [[held[one.src].get(c, nothing) for c in one.chunks] for one in step.transfers]
        for one, values in zip(step.transfers, sent, strict=True):
            for chunk, value in zip(one.chunks, values, strict=True):
                if one.combine != "copy":
                    before = held[one.dst].get(chunk, nothing)
                    lost = any(x.dtype == object and v != v for v in (before, value))
                    value = nothing if lost else FUNCTIONS[one.combine](before, value)
                held[one.dst][chunk] = value
    return np.array([[held[r].get(c, nothing) for c in row] for r, row in enumerate(schedule.end)])


def random_schedule(rng: np.random.Generator, combine: Combine, ranks: int = 4) -> Schedule:
    """Random messages on two rails, as long as `simulate` accepts them."""
    start = tuple(tuple(rng.choice(6, 2, replace=False).tolist()) for _ in range(ranks))
    schedule = Schedule(
        axes=("expert",), sizes=(ranks,), num_chunks=6, start=start, end=start, steps=()
    )
    for attempt in range(40):
        kind: Combine = ("copy", combine)[attempt % 2]
        transfers: tuple[Transfer, ...] = ()
        for rail in range(2):
            for src, dst in enumerate(rng.permutation(ranks).tolist()):
                one = Transfer(src, dst, (int(rng.integers(6)),), kind, rail)
                step = Step((*transfers, one))
                with contextlib.suppress(InputError):
                    simulate(dataclasses.replace(schedule, steps=(*schedule.steps, step)))
                    transfers = (*transfers, one)
        if transfers:
            schedule = dataclasses.replace(schedule, steps=(*schedule.steps, Step(transfers)))
    assert {one.combine for step in schedule.steps for one in step.transfers} == {"copy", combine}
    end = tuple(tuple(sorted(held)) for held in simulate(schedule))
    shortest = min(len(held) for held in end)
    return dataclasses.replace(schedule, end=tuple(held[-shortest:] for held in end))


def mutate(rng: np.random.Generator, schedule: Schedule) -> Schedule:
    """One mistake: a step, a message or a chunk is another one, or missing."""
    steps = list(schedule.steps)
    at = int(rng.integers(len(steps)))
    transfers = list(steps[at].transfers)
    who = int(rng.integers(len(transfers)))
    one = transfers[who]
    kind = rng.choice(["step", "message", "chunk", "combine", "twice"])
    if kind == "step":
        del steps[at]
    elif kind == "twice":
        steps.insert(at, steps[at])
    elif kind == "message":
        del transfers[who]
    elif kind == "chunk":
        other = int(rng.integers(schedule.num_chunks))
        transfers[who] = dataclasses.replace(one, chunks=(other, *one.chunks[1:]))
    else:
        flip: Combine = "copy" if one.combine != "copy" else "add"
        transfers = [dataclasses.replace(each, combine=flip) for each in transfers]
    if kind in ("message", "chunk", "combine"):
        steps[at : at + 1] = [Step(tuple(transfers))] if transfers else []
    return dataclasses.replace(schedule, steps=tuple(steps))
