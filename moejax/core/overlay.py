"""Strict command-line overrides for frozen dataclass configs: `--set model.num_experts=64`."""

import ast
import dataclasses
import types
import typing
from typing import Any, TypeVar

from moejax.core.errors import InputError

Config = TypeVar("Config")


def overlay(config: Config, assignments: list[str]) -> Config:
    """Returns `config` with every `'a.b=value'` of `assignments` applied in order.

    Values are Python literals; what does not parse as one is a string. Raises `InputError` for a
    missing `=`, an unknown field or a value of the wrong type. Only int -> float is converted.

    >>> @dataclasses.dataclass(frozen=True)
    ... class C:
    ...     lr: float = 0.1
    >>> overlay(C(), ["lr=1"])
    C(lr=1.0)
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment!r} has no '='; write field.name=value")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        try:
            config = _replace(config, path.split("."), value, path)
        except InputError:
            raise
        except ValueError as error:  # a config's own __post_init__ refused it
            raise InputError(f"--set {assignment}: {error}") from error
    return config


def _replace(node: Any, names: list[str], value: Any, path: str) -> Any:
    name, rest = names[0], names[1:]
    if not dataclasses.is_dataclass(node):
        raise InputError(f"--set {path}: {type(node).__name__} value has no field {name!r}")
    fields = sorted(field.name for field in dataclasses.fields(node))
    if name not in fields:
        raise InputError(f"--set {path}: {type(node).__name__} has no field {name!r}; has {fields}")
    if rest:
        inner = _replace(getattr(node, name), rest, value, path)
        return dataclasses.replace(node, **{name: inner})
    want = typing.get_type_hints(type(node))[name]
    if want is float and type(value) is int:
        value = float(value)
    if not _accepts(want, value):
        raise InputError(f"--set {path} wants {_spell(want)}, got {value!r}")
    return dataclasses.replace(node, **{name: value})


def _spell(want: Any) -> str:
    return want.__name__ if isinstance(want, type) else str(want).replace("typing.", "")


def _accepts(want: Any, value: Any) -> bool:
    args, origin = typing.get_args(want), typing.get_origin(want)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_accepts(args[0], item) for item in value)
        return len(args) == len(value) and all(
            _accepts(a, v) for a, v in zip(args, value, strict=True)
        )
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(arg, value) for arg in args)
    return type(value) is want
