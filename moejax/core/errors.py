"""The one exception that means "the user asked for something impossible"."""


class InputError(ValueError):
    """Wrong configuration, flag or file.

    The message is one line that names the value and what was expected, so that a command-line
    program can print it alone and exit with status 2. Anything else that escapes is a bug and
    keeps its traceback.
    """


def check(condition: bool, message: str) -> None:
    """Raises `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def check_seed(seed: int) -> None:
    """Raises `InputError` for seeds that JAX would wrap around or that NumPy refuses."""
    check(0 <= seed < 2**32, f"seed={seed} must be at least 0 and below 2**32")
