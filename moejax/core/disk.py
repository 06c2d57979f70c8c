"""Room on a disk, and errors of writing to it, in one line.

NumPy and Python raise `OSError`; orbax and tensorstore write in threads of their own and pass on
whatever those raised, often with nothing but the system's words in the text.
"""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from moejax.core.errors import InputError, check


@contextlib.contextmanager
def writing(what: str, path: Any) -> Iterator[None]:
    """Turns what a disk refuses into `InputError`: no room, no permission, a file in the way."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            raise InputError(f"no free disk space for {what} in {path}") from error
        for limit in (errno.EDQUOT, errno.EFBIG, errno.EROFS):
            if number == limit or os.strerror(limit) in str(error):
                raise InputError(f"cannot write {what} in {path}: {os.strerror(limit)}") from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise InputError(f"cannot write {what} in {path}: {error.strerror}") from error
        raise


def check_free(what: str, path: str | pathlib.Path, nbytes: int) -> None:
    """Raises `InputError` now, not after minutes, where `nbytes` do not fit the disk of `path`."""
    folder = pathlib.Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    want, have = nbytes / 2**20, shutil.disk_usage(folder).free / 2**20
    check(
        have >= want,
        f"no free disk: {what} in {path} want {want:.0f} MiB, found {have:.0f} MiB",
    )
