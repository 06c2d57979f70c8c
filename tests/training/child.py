"""Trains the tiny model and kills itself: `python -m tests.training.child FOLDER MOMENT [A=B ...]`.

MOMENT is `step:N:M`, before step N is dispatched, with the one before in flight and M the newest
complete checkpoint; `write:N`, while the files of checkpoint N are being written; or `never`.
The rest overrides fields of the training config.
"""

import os
import pathlib
import signal
import sys
import threading
import time

import tests.conftest  # noqa: F401  (devices and strict flags, as in the tests)
from moejax.core.overlay import overlay
from moejax.data import source
from moejax.training import loop
from tests.training.helpers import text_bytes, tiny_model, tiny_train


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(folder: pathlib.Path, step: int, complete: str) -> None:
    real = source.batch

    def batch(data, seed, at, **shape):
        while at == step and not (folder / complete).exists():
            time.sleep(0.001)  # the save is asynchronous and these steps take no time
        if at == step:
            kill()
        return real(data, seed, at, **shape)

    source.batch = batch


def kill_at_write(folder: pathlib.Path, step: int) -> None:
    def watch() -> None:
        while not list(folder.glob(f"{step}.orbax-checkpoint-tmp*/params*")):
            pass
        kill()

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    folder, (name, *at) = pathlib.Path(sys.argv[1]), sys.argv[2].split(":")
    if name == "step":
        kill_at_step(folder, int(at[0]), at[1])
    elif name == "write":
        kill_at_write(folder, int(at[0]))
    cfg = overlay(tiny_train(), sys.argv[3:])
    result = loop.train(text_bytes(), tiny_model(), cfg, path=folder)
    print(result.resumed_step)
