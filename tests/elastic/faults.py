"""Moments at which a process dies, and processes to die at them."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]


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


def _child(port, index, *arguments):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
    command = [sys.executable, "-m", "tests.elastic.processes_child", str(port), str(index)]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def start(folder, steps, pause, moments):
    """Three processes with a moment each, and what starts one of them again."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = [(folder / str(i), steps, pause) for i in range(3)]
    children = [_child(port, i, *arguments[i], moments.get(i, "never")) for i in range(3)]
    return children, lambda i, moment: _child(port, i, *arguments[i], moment)
