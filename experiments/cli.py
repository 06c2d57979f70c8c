"""What every experiment does around its own code: flags, one-line errors, JSON reports."""

import datetime
import errno
import functools
import glob
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

from absl import app, flags, logging

from moejax.core.errors import InputError, check

JSON = flags.DEFINE_string("json", None, "where to write the report of this run, as JSON")
Rung = Literal["numerics", "schedule", "time", "simulated"]

flags.disclaim_key_flags()  # what is defined below counts as the calling program's, for --help


@functools.cache
def define_set() -> flags.FlagHolder:
    """The flag `--set`, for programs that have a config; unknown to the others.

    One flag, however many of these programs a process imports.
    """
    return flags.DEFINE_multi_string("set", [], "config override such as train.seq_len=64")


def run(main: Callable[[], None]) -> None:
    """Parses flags strictly and runs `main`; wrong input ends in one line and status 2."""

    def guarded(argv: list[str]) -> None:
        try:
            if len(argv) > 1:
                raise InputError(f"unexpected argument {argv[1]!r}; every option is a --flag")
            main()
        except InputError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                _fail(f"no free disk space for {error.filename or 'output'}: {error.strerror}")
            if error.filename is not None:
                _fail(f"{error.filename}: {error.strerror}")
            raise
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    _settle_platform()
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["json"])
    app.run(guarded, flags_parser=_parse)


def _settle_platform() -> None:
    """Keeps an installed libtpu from searching for a TPU, loudly, on a machine that has none."""
    import jax

    devices = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
    if not os.environ.get("JAX_PLATFORMS") and not any(glob.glob(path) for path in devices):
        jax.config.update("jax_platforms", "cpu")


def use_cpu_cores(limit: int) -> None:
    """Makes up to `limit` CPU devices, one per core; call before anything asks for devices.

    XLA:CPU runs a small product on one core, so one device leaves the others idle.
    """
    use_cpu_devices(min(limit, cpu_cores()))


def use_cpu_devices(devices: int) -> None:
    """Makes so many CPU devices; call before anything asks for devices."""
    import jax

    # Collectives block pool threads; with a thread per core they can wait for each other forever.
    os.environ.setdefault("NPROC", str(2 * max(devices, cpu_cores())))
    jax.config.update("jax_num_cpu_devices", devices)


def cpu_cores() -> int:
    """Cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores or 1


def _parse(argv: list[str]) -> list[str]:
    # Libraries warn of what then ends in an error; --verbosity=0 shows which kernels were picked.
    logging.set_verbosity(logging.ERROR)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(" ".join(str(error).split()))
        raise


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text`, see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file, complete or not at all: under a temporary name beside `path`, then renamed."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def check_writable(path: str | None) -> None:
    """Fails now, not after minutes of work, when `path` cannot become a file."""
    if path is None:
        return
    check(path != "", "the path of an output file is empty")
    target = pathlib.Path(path).absolute()
    check(not target.is_dir(), f"cannot write {path}: it is a folder")
    # A device such as /dev/null would be replaced by the rename.
    check(target.is_file() or not target.exists(), f"cannot write {path}: it is not a regular file")
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    check(writable, f"cannot write {path}: {folder} is not a writable folder")


def read_counts(flag: flags.FlagHolder) -> list[int]:
    """The positive whole numbers of a list flag; `InputError` for anything else."""
    words = [word.strip() for word in flag.value]
    good = bool(words) and all(word.isdecimal() and int(word) > 0 for word in words)
    check(good, f"--{flag.name}={','.join(flag.value)} is not a list of positive numbers")
    return [int(word) for word in words]


def report(name: str, rung: Rung, figures: dict[str, Any], *, device: str | None = None) -> dict:
    """The record of a run: its figures, and what they were measured on."""
    return {
        "name": name,
        "rung": rung,
        "device": device or _device(),
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "command": "python -m " + " ".join([_module(), *sys.argv[1:]]),
        "figures": figures,
    }


def write_report(name: str, rung: Rung, figures: dict[str, Any], **kwargs: Any) -> dict:
    """Builds the report and writes it to `--json`, when given."""
    record = report(name, rung, figures, **kwargs)
    if JSON.value:
        write_text(JSON.value, json.dumps(record, indent=1) + "\n")
    return record


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else pathlib.Path(sys.argv[0]).stem


def _device() -> str:
    import jax

    device = jax.devices()[0]
    kind = f"{device.device_kind} ({platform.machine()}, {cpu_cores()} cores)"
    return kind if device.platform == "cpu" else device.device_kind


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    """Commit of the checkout, with `+` when it has uncommitted changes."""
    here = pathlib.Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True)
        dirty = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if dirty.strip() else "")
