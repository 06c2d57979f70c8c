"""Runs many command lines of one program in one process, since importing JAX takes seconds.

    python -m tests.experiments.wrong_input_child experiments.quickstart <cases.json

Reads a list of cases, `{"args": [...], "fault": null | "no_free_disk" | "file_limit"}`, runs the
program's own entry point on each with fresh flags, and prints a JSON list of what a shell would
have seen: exit status and everything written to file descriptor 2.
"""

import contextlib
import importlib
import json
import os
import resource
import shutil
import sys
import tempfile
from unittest import mock

from absl import flags
from absl.testing import flagsaver

from experiments import cli


@contextlib.contextmanager
def redirected(descriptor, file):
    saved = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        os.dup2(saved, descriptor)
        os.close(saved)


@contextlib.contextmanager
def no_free_disk():
    with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=3 << 20)):
        yield


@contextlib.contextmanager
def file_limit():
    """The system refuses to write past the first kilobyte of any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FAULTS = {None: contextlib.nullcontext, "no_free_disk": no_free_disk, "file_limit": file_limit}


def run_case(program, case):
    argv = [f"{program.__name__}.py", *case["args"]]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with redirected(1, out), redirected(2, err), flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            status = None
            with mock.patch.object(sys, "argv", argv), FAULTS[case["fault"]]():
                try:
                    cli.run(program.main)
                except SystemExit as stop:
                    status = stop.code
                except BaseException as error:  # a shell would see a traceback
                    print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        err.seek(0)
        return {"status": status, "stderr": err.read().decode()}


if __name__ == "__main__":
    module = importlib.import_module(sys.argv[1])
    results = [run_case(module, case) for case in json.load(sys.stdin)]
    print("\n" + json.dumps(results))
