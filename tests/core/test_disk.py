"""What a full disk says, whoever met it first."""

import errno

import pytest

from moejax.core.disk import writing
from moejax.core.errors import InputError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no free disk space for a table in x$"),
        (OSError(errno.EFBIG, "File too large"), "cannot write a table in x: File too large"),
        (ValueError("RESOURCE_EXHAUSTED: No space left on device [os=28]"), "no free disk space"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot write a table in x: Permiss"),
        (FileExistsError(errno.EEXIST, "File exists"), "cannot write a table in x: File exists"),
    ],
)
def test_errors_of_the_disk_become_one_line(error, message):
    with pytest.raises(InputError, match=f"^{message}") as caught, writing("a table", "x"):
        raise error
    assert caught.value.__cause__ is error


def test_bugs_stay_bugs():
    with pytest.raises(ValueError, match="^shapes differ$") as caught, writing("a table", "x"):
        raise ValueError("shapes differ")
    assert not isinstance(caught.value, InputError)
