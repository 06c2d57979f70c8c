"""One of three processes of an elastic run, which may be told to die.

    python -m experiments.fault_steps.child PORT INDEX FILE STEPS PAUSE MOMENT

MOMENT is `never`, `start` (joined, no step taken), `in:N` (in step N, before its collective),
`after:N` (step N done here, the others may not know), `save:N` (while checkpoint N is written),
`rejoin` (when the others have taken it in), `hang:N` (in step N, for ever) or `late:N` (to step N,
so that the others give up waiting). Process 0 keeps checkpoints in FILE.saves. Writes state, events
and seconds to FILE.
"""

import contextlib
import os
import pathlib
import pickle
import signal
import sys
import time

# A rank whose neighbour lives on but has given up would wait half an hour for it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_timeout_seconds=2"
)

import jax  # noqa: E402

from experiments.fault_steps.problem import START, train_step  # noqa: E402
from moejax.elastic.alive import run_alive  # noqa: E402
from moejax.elastic.saves import open_alone, save_state  # noqa: E402
from moejax.elastic.watchdog import Watchdog  # noqa: E402

SAVE_EVERY = 2
# Of the one that hangs. The others must not be taken for stuck, however slow the machine.
STUCK_S, PATIENT_S = 8.0, 60.0
LATE_S = 3.0  # longer than a collective waits, shorter than a process counts as alive


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Child:
    """The run's callbacks."""

    def __init__(self, pause, moment, saves):
        self.kind, _, at = moment.partition(":")
        self.at, self.pause, self.saves = int(at or -1), pause, saves
        self.events, self.seconds, self.begin = [], [], time.monotonic()

    def step(self, mesh, state, number):
        if self.kind == "in" and number == self.at:
            kill()
        if self.kind == "hang" and number == self.at:
            time.sleep(1000)
        if self.kind == "late" and number == self.at:
            self.at = -1  # once
            time.sleep(LATE_S)
        new = train_step(mesh, state, number)
        if self.kind == "after" and number == self.at:
            kill()
        time.sleep(self.pause)
        return new

    def notify(self, event):
        self.events.append(event)
        if self.kind == "rejoin" and event.kind == "members":
            kill()

    def completed(self, number, state):
        self.seconds.append(time.monotonic() - self.begin)
        self.begin = time.monotonic()
        if self.saves is not None and number % SAVE_EVERY == 0:
            save_state(self.saves, number, state)
        if self.kind == "save" and number == self.at:
            kill()  # the files are being written


def main(port, index, file, steps, pause, moment):
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_enable_recoverability", True)
    jax.distributed.initialize(f"localhost:{port}", 3, int(index), heartbeat_timeout_seconds=4)
    devices = jax.devices()
    if moment == "start":
        kill()
    alone = open_alone(f"{file}.saves") if index == "0" else contextlib.nullcontext()
    limit = STUCK_S if moment.startswith("hang") else PATIENT_S
    with alone as saves, Watchdog(limit) as watchdog:
        child = Child(float(pause), moment, saves)
        state = run_alive(
            devices,
            START,
            child.step,
            int(steps),
            notify=child.notify,
            completed=child.completed,
            guard=watchdog.guard,
        )
    result = {"state": state, "events": child.events, "seconds": child.seconds}
    pathlib.Path(file).write_bytes(pickle.dumps(result))
    print(child.events, flush=True)
    os._exit(0)  # the shutdown barrier would wait for those who are gone


if __name__ == "__main__":
    main(*sys.argv[1:])
