"""`InputError` is what command-line programs print alone."""

import pytest

from moejax.core.errors import InputError, check


def test_check_raises_its_message_only_when_the_condition_fails():
    check(True, "never seen")
    with pytest.raises(InputError, match=r"^top_k=9 exceeds 8$"):
        check(9 <= 8, "top_k=9 exceeds 8")
    assert issubclass(InputError, ValueError)
