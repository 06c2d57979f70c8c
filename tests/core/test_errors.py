"""`InputError` is what command-line programs print alone."""

import pytest

from moejax.core.errors import InputError, check, check_seed


def test_check_raises_its_message_only_when_the_condition_fails():
    check(True, "never seen")
    with pytest.raises(InputError, match=r"^top_k=9 exceeds 8$"):
        check(9 <= 8, "top_k=9 exceeds 8")
    assert issubclass(InputError, ValueError)


def test_seeds_are_32_bits():
    check_seed(0), check_seed(2**32 - 1)
    for seed in (-1, 2**32):
        with pytest.raises(
            InputError, match=rf"^seed={seed} must be at least 0 and below 2\*\*32$"
        ):
            check_seed(seed)
