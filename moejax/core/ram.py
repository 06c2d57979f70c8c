"""How much host memory a process may still take, and a check before minutes of reading."""

import pathlib

from moejax.core.errors import check

_MEMINFO = pathlib.Path("/proc/meminfo")
_CGROUP = pathlib.Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Host memory that can be taken without swapping, in bytes; None where no one says.

    The smaller of what Linux estimates (`MemAvailable`) and what a container's limit leaves.
    """
    found = [size for size in (_of_system(), _of_container()) if size is not None]
    return min(found) if found else None


def check_host_memory(nbytes: int, what: str) -> None:
    """Raises `InputError` that says how much is missing when `nbytes` do not fit the host."""
    available = available_bytes()
    if available is None:
        return
    check(
        nbytes <= available,
        f"host memory is too small for {what}: {nbytes} bytes, {available} are available; "
        f"{nbytes - available} bytes ({(nbytes - available) / 2**30:.1f} GiB) are missing",
    )


def _of_system() -> int | None:
    if not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_container() -> int | None:
    """What a limit of control groups, version 2, leaves; pages of files can be dropped."""
    limit, used, stat = (_CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not limit.exists() or limit.read_text().strip() == "max":
        return None
    pages = dict(line.split() for line in stat.read_text().splitlines())
    return int(limit.read_text()) - int(used.read_text()) + int(pages.get("inactive_file", 0))
