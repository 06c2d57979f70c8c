"""Strict command-line overrides for frozen dataclass configs: `--set train.seq_len=64`."""

import ast
import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

from moejax.core.errors import InputError

Config = TypeVar("Config")


def overlay(config: Config, assignments: list[str]) -> Config:
    """Returns `config` with every `'a.b=value'` of `assignments` applied; the last of a field wins.

    Values are Python literals; what does not parse as one is a string. Raises `InputError` for a
    missing `=`, an unknown field or a value of the wrong type. Only int -> float is converted,
    and infinity is not a float here.

    >>> @dataclasses.dataclass(frozen=True)
    ... class C:
    ...     lr: float = 0.1
    >>> overlay(C(), ["lr=1"])
    C(lr=1.0)
    """
    changes: dict[tuple[str, ...], Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment!r} has no '='; write field.name=value")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):  # TypeError: "{[]: 1}" and its kind
            value = text
        names = tuple(path.split("."))
        changes[names] = _checked(config, names, value, path)
    return _apply(config, changes, "") if changes else config


def _checked(node: Any, names: tuple[str, ...], value: Any, path: str) -> Any:
    """`value` as the field at `names` below `node` wants it."""
    name, rest = names[0], names[1:]
    if not dataclasses.is_dataclass(node):
        raise InputError(f"--set {path}: {type(node).__name__} value has no field {name!r}")
    fields = sorted(field.name for field in dataclasses.fields(node))
    if name not in fields:
        raise InputError(f"--set {path}: {type(node).__name__} has no field {name!r}; has {fields}")
    if rest:
        return _checked(getattr(node, name), rest, value, path)
    want = typing.get_type_hints(type(node))[name]
    if dataclasses.is_dataclass(want):
        inner = ", ".join(f"{path}.{field.name}" for field in dataclasses.fields(want))
        raise InputError(f"--set {path} wants {_spell(want)}, got {value!r}; set {inner}")
    try:
        return _fit(want, value)
    except (TypeError, OverflowError) as error:
        raise InputError(f"--set {path} wants {_spell(want)}, got {value!r}") from error


def _apply(node: Any, changes: dict[tuple[str, ...], Any], prefix: str) -> Any:
    """Rebuilds each config once, so that fields which depend on each other may change together."""
    fields: dict[str, dict[tuple[str, ...], Any]] = {}
    for names, value in changes.items():
        fields.setdefault(names[0], {})[names[1:]] = value
    new = {
        name: inner[()] if () in inner else _apply(getattr(node, name), inner, f"{prefix}{name}.")
        for name, inner in fields.items()
    }
    try:
        return dataclasses.replace(node, **new)
    except ValueError as error:  # the config's own __post_init__ refused it
        paths = ", ".join(prefix + ".".join(names) for names in changes)
        raise InputError(f"--set {paths}: {error}") from error


def _spell(want: Any) -> str:
    plain = isinstance(want, type) and not typing.get_args(want)
    return want.__name__ if plain else str(want).replace("typing.", "")


def _fit(want: Any, value: Any) -> Any:
    """`value`, with ints as floats where `want` says float; TypeError when it does not fit."""
    args, origin = typing.get_args(want), typing.get_origin(want)
    if origin is typing.Literal:
        if any(type(value) is type(arg) and value == arg for arg in args):
            return value
    elif origin is tuple and isinstance(value, tuple):
        wants = args[:1] * len(value) if args[1:] == (Ellipsis,) else args
        if len(wants) == len(value):
            return tuple(_fit(w, v) for w, v in zip(wants, value, strict=True))
    elif origin in (typing.Union, types.UnionType):
        for arg in args:
            try:
                return _fit(arg, value)
            except TypeError:
                continue
    elif want is float and type(value) in (int, float):
        if math.isfinite(value):
            return float(value)
    elif type(value) is want:
        return value
    raise TypeError(f"{value!r} is not {want}")
