"""A loop that stops beating is noticed; one that goes on is left alone."""

import doctest
import subprocess
import sys
import threading
import time

import pytest

from moejax.core.errors import InputError
from moejax.elastic import watchdog as module
from moejax.elastic.watchdog import EXIT_STUCK, Watchdog


def test_doctests():
    assert doctest.testmod(module).failed == 0


def test_stuck_is_told_once():
    told, heard = [], threading.Event()

    def stuck(seconds):
        told.append(seconds)
        heard.set()

    with Watchdog(0.2, stuck):
        assert heard.wait(20)
        time.sleep(0.1)
    assert len(told) == 1 and told[0] > 0.2


def test_beats_keep_it_quiet():
    told = []
    with Watchdog(5.0, told.append) as watchdog:
        for _ in range(10):
            watchdog.beat()
            time.sleep(0.01)
    assert told == []


def test_who_waits_for_others_is_not_stuck():
    told, heard = [], threading.Event()

    def stuck(seconds):
        told.append(seconds)
        heard.set()

    with Watchdog(0.3, stuck) as watchdog:
        with watchdog.guard():
            pass
        time.sleep(0.6)
        assert told == []
        with watchdog.guard():
            assert heard.wait(20)


def test_a_stuck_process_ends():
    code = (
        "import time; from moejax.elastic.watchdog import Watchdog\n"
        "with Watchdog(0.2): time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_STUCK and "ending this process" in done.stderr


def test_no_time_is_no_limit():
    with pytest.raises(InputError, match="limit_s=0 must be positive"):
        Watchdog(0)
