"""Picks a backend: the first that does not refuse, saying which and why not the others.

A backend refuses by raising `NotImplementedError(reason)` while it is traced.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

from moejax.core.errors import InputError

_LOGGER = logging.getLogger("moejax.kernels")
Implementation = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What ran, and the backends before it with their reasons for refusing."""

    implementation: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        because = "; ".join(f"{name} refused: {reason}" for name, reason in self.refused)
        return f"{self.implementation} ({because})" if because else self.implementation


def run_first(
    op: str,
    backends: dict[str, Callable[..., Any]],
    implementation: Implementation,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, Choice]:
    """Result of the first willing backend of `implementation`, and the choice.

    `None` tries all of `backends` in their order, a name forces one, a sequence is tried in order.
    Raises `InputError` for an unknown name, `NotImplementedError` listing every reason when all
    refuse. The choice is logged once per process.
    """
    names = [implementation] if isinstance(implementation, str) else implementation or backends
    refused: list[tuple[str, str]] = []
    for name in names:
        if name not in backends:
            raise InputError(f"{op} implementation={name!r}, expected one of {list(backends)}")
        try:
            result = backends[name](*args, **kwargs)
        except NotImplementedError as reason:
            refused.append((name, str(reason)))
            continue
        choice = Choice(implementation=name, refused=tuple(refused))
        _log_once(op, choice)
        return result, choice
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
    raise NotImplementedError(f"{op}: every implementation refused: {reasons}")


def explain_first(
    op: str,
    backends: dict[str, Callable[..., Any]],
    implementation: Implementation,
    *args: Any,
    **kwargs: Any,
) -> Choice:
    """The choice that `run_first` makes, from shapes alone; arrays or `ShapeDtypeStruct`s."""
    choices: list[Choice] = []

    def run(*args: Any) -> Any:
        result, choice = run_first(op, backends, implementation, *args, **kwargs)
        choices.append(choice)
        return result

    jax.eval_shape(run, *args)
    return choices[0]


@functools.cache
def _log_once(op: str, choice: Choice) -> None:
    _LOGGER.info("%s runs on %s", op, choice)
