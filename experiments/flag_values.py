"""Values of flags that several programs read alike."""

from moejax.core.errors import InputError, check
from moejax.offload.budget import parse_budget


def parse_numbers(flag: str, texts: list[str]) -> list[int]:
    """The positive whole numbers of a list flag, each once, in order; or `InputError`."""
    good = bool(texts) and all(t.isascii() and t.isdigit() and int(t) > 0 for t in texts)
    check(good, f"--{flag}={','.join(texts)}: not positive whole numbers")
    return sorted({int(text) for text in texts})


def parse_fraction(flag: str, text: str) -> float:
    """`25%` -> 0.25; or `InputError`."""
    budget = parse_budget(text)
    if not isinstance(budget, float):
        raise InputError(f"--{flag}={text} is not a percentage such as 25%")
    return budget
