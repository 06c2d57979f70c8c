"""Moments at which a process dies, and runs of three processes in which one does."""

import dataclasses
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
from typing import Any

import numpy as np

from experiments.fault_steps.problem import START
from moejax.core.errors import check
from moejax.elastic.saves import latest_state, open_alone

ROOT = pathlib.Path(__file__).parents[2]
STEPS, LONG = 8, 60  # long enough to be started again in
PAUSE_S = 0.5


def draw_moments(seed: int) -> list[tuple[str, int]]:
    """Ten (moment, victim): kinds in turn, numbers at random."""
    rng, drawn = np.random.default_rng(seed), []
    for kind in ["in", "save", "start", "after", "rejoin"] * 2:
        at = {"save": 2 * int(rng.integers(1, 4))}.get(kind, int(rng.integers(1, 7)))
        name = kind if kind in ("start", "rejoin") else f"{kind}:{at}"
        # The second time it is the coordinator, but for what only others can do.
        leader = len(drawn) >= 5 and kind in ("in", "save", "after")
        drawn.append((name, 0 if leader else int(rng.integers(1, 3))))
    return drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was left of a run.

    Attributes:
        codes: exit codes of the two that were not killed, by their index.
        outputs: what they printed.
        results: state, events and seconds of those that came to the end.
        saved: steps of the newest checkpoint, and its state.
    """

    steps: int
    codes: dict[int, int]
    outputs: dict[int, str]
    results: dict[int, dict[str, Any]]
    saved: tuple[int, dict]


def run_moment(folder: pathlib.Path, moment: str, victim: int) -> Outcome:
    """Three processes, of which one kills itself; `rejoin` is started again to do it once more."""
    rejoins = moment == "rejoin"
    steps, pause = (LONG, PAUSE_S) if rejoins else (STEPS, 0.0)
    children, start_again = start(folder, steps, pause, {victim: "in:2" if rejoins else moment})
    try:
        _wait_killed(children[victim])
        if rejoins:
            children.append(start_again(victim, moment))
            _wait_killed(children[-1])
        others = {i: child for i, child in enumerate(children[:3]) if i != victim}
        outputs = {i: child.communicate(timeout=240)[0] for i, child in others.items()}
    finally:
        for child in children:
            child.kill()  # nothing to those that have ended
    codes = {i: child.returncode for i, child in others.items()}
    results = {
        i: pickle.loads((folder / str(i)).read_bytes()) for i, code in codes.items() if code == 0
    }
    with open_alone(folder / "0.saves") as saves:
        saved = latest_state(saves, START)
    return Outcome(steps=steps, codes=codes, outputs=outputs, results=results, saved=saved)


def start(folder: pathlib.Path, steps: int, pause: float, moments: dict[int, str]):
    """Three processes with a moment each, and what starts one of them again."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = [(folder / str(i), steps, pause) for i in range(3)]
    children = [_child(port, i, *arguments[i], moments.get(i, "never")) for i in range(3)]
    return children, lambda i, moment: _child(port, i, *arguments[i], moment)


def _child(port: int, index: int, *arguments: Any) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
    command = [sys.executable, "-m", "experiments.fault_steps.child", str(port), str(index)]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _wait_killed(child: subprocess.Popen) -> None:
    code = child.wait(240)
    output = child.stdout.read() if child.stdout and code != -signal.SIGKILL else ""
    check(code == -signal.SIGKILL, f"a process was to be killed and ended with {code}: {output}")
