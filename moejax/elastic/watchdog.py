"""A watchdog for ranks that are alive but stuck.

JAX notices a process that died, by its heartbeat. One that hangs still beats, and all others wait
for it in their next collective, for ever. The watchdog runs in a thread of its own and ends the
process when no step has been completed for too long: then it is dead, and the others go on.

One that only waits for others must not be taken for stuck: `rest` says that it does, and `guard` is
for `run_alive`, which waits at the end of every step until all have ended theirs.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from moejax.core.errors import check

EXIT_STUCK = 75  # EX_TEMPFAIL: start it again


def end_process(seconds: float) -> None:
    """Says why, and leaves at once: a stuck device call cannot be interrupted."""
    print(f"no step for {seconds:.0f} s, ending this process", file=sys.stderr, flush=True)
    os._exit(EXIT_STUCK)


class Watchdog:
    """Calls `stuck(seconds)` once when `beat` was not called for `limit_s`; a context manager.

    >>> with Watchdog(limit_s=60.0) as watchdog:
    ...     watchdog.beat()
    """

    def __init__(self, limit_s: float, stuck: Callable[[float], None] = end_process):
        check(limit_s > 0, f"limit_s={limit_s} must be positive")
        self._limit, self._stuck = limit_s, stuck
        self._last: float | None = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """A step was completed, or begins."""
        self._last = time.monotonic()

    def rest(self) -> None:
        """Until the next beat this process has nothing to do but to wait for others."""
        self._last = None

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Watches what runs inside, which must not take longer than the limit."""
        self.beat()
        try:
            yield
        finally:
            self.rest()

    def _watch(self) -> None:
        while not self._done.wait(self._limit / 8):
            last = self._last
            idle = 0.0 if last is None else time.monotonic() - last
            if idle > self._limit:
                self._stuck(idle)
                return

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
