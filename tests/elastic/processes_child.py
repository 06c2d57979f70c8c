"""One of three processes of an elastic run, which may be told to die.

    python -m tests.elastic.processes_child PORT INDEX FILE STEPS PAUSE MOMENT

MOMENT is `never`, `start` (joined, no step taken), `in:N` (in step N, before its collective) or
`after:N` (step N done here, the others may not know). Writes state, events and seconds to FILE.
"""

import os
import pathlib
import pickle
import signal
import sys
import time

# A rank whose neighbour lives on but has given up would wait half an hour for it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_timeout_seconds=4"
)

import jax  # noqa: E402

from moejax.elastic.alive import run_alive  # noqa: E402
from moejax.elastic.watchdog import Watchdog  # noqa: E402
from tests.elastic.problem import START, train_step  # noqa: E402


def main(port, index, file, steps, pause, moment):
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_enable_recoverability", True)
    jax.distributed.initialize(f"localhost:{port}", 3, int(index), heartbeat_timeout_seconds=5)
    kind, _, at = moment.partition(":")
    devices = jax.devices()
    if kind == "start":
        os.kill(os.getpid(), signal.SIGKILL)

    def step(mesh, state, number):
        if kind == "in" and number == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        new = train_step(mesh, state, number)
        if kind == "after" and number == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(pause))
        return new

    events, seconds, begin = [], [], [time.monotonic()]
    with Watchdog(60.0) as watchdog:

        def completed(number, state):
            seconds.append(time.monotonic() - begin[0])
            begin[0] = time.monotonic()
            watchdog.beat()

        state = run_alive(
            devices, START, step, int(steps), notify=events.append, completed=completed
        )
    result = {"state": state, "events": events, "seconds": seconds}
    pathlib.Path(file).write_bytes(pickle.dumps(result))
    print(events, flush=True)
    os._exit(0)  # the shutdown barrier would wait for those who are gone


if __name__ == "__main__":
    main(*sys.argv[1:])
