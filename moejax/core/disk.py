"""Errors of writing to a disk, in one line.

NumPy and Python raise `OSError`; orbax and tensorstore write in threads of their own and pass on
whatever those raised, often with nothing but the system's words in the text.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from moejax.core.errors import InputError


@contextlib.contextmanager
def writing(what: str, path: Any) -> Iterator[None]:
    """Turns a full disk, a missing permission and a file in the way into `InputError`."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            raise InputError(f"no free disk space for {what} in {path}") from error
        for limit in (errno.EDQUOT, errno.EFBIG):
            if number == limit or os.strerror(limit) in str(error):
                raise InputError(f"cannot write {what} in {path}: {os.strerror(limit)}") from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise InputError(f"cannot write {what} in {path}: {error.strerror}") from error
        raise
