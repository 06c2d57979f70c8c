"""Frozen dataclass configs to JSON values and strictly back."""

import dataclasses
import types
import typing
from typing import Any, TypeVar

from moejax.core.errors import InputError, check

Config = TypeVar("Config")


def to_json(config: Any) -> dict[str, Any]:
    """The config as dicts, lists and scalars."""
    return dataclasses.asdict(config)


def from_json(cls: type[Config], value: Any, where: str) -> Config:
    """The inverse of `to_json`: nothing missing, nothing unknown, every type as declared.

    Raises `InputError` naming the field (`where` is the name of the whole).
    """
    check(isinstance(value, dict), f"{where} wants an object of {cls.__name__}, got {value!r}")
    names = _field_names(cls)
    unknown, missing = sorted(value.keys() - names), sorted(names - value.keys())
    check(not unknown, f"{where}: {cls.__name__} has no field {', '.join(map(repr, unknown))}")
    check(not missing, f"{where}: {cls.__name__} lacks field {', '.join(map(repr, missing))}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _parse(hints[name], v, f"{where}.{name}") for name, v in value.items()})


def _field_names(cls: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()


def _parse(hint: Any, value: Any, where: str) -> Any:
    args, origin = typing.get_args(hint), typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [arg for arg in args if arg is not type(None)]
        if len(options) > 1 and isinstance(value, dict):  # configs are told apart by their fields
            options = [arg for arg in options if _field_names(arg) == value.keys()] or options[:1]
        check(len(options) == 1, f"{where}: a config field of type {hint} cannot be stored")
        return _parse(options[0], value, where)
    if origin is tuple:
        return _parse_tuple(args, value, where)
    if origin is typing.Literal and value in args:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is hint:
        return value
    raise InputError(f"{where} wants {_spell(hint)}, got {value!r}")


def _parse_tuple(args: tuple, value: Any, where: str) -> tuple:
    check(isinstance(value, list), f"{where} wants a list, got {value!r}")
    hints = (args[0],) * len(value) if args[-1] is Ellipsis else args
    check(len(hints) == len(value), f"{where} wants {len(hints)} items, got {len(value)}")
    return tuple(
        _parse(hint, item, f"{where}[{i}]")
        for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def difference(stored: Any, wanted: Any) -> str:
    """The fields in which two configs (of any class) differ, as `field=stored, not wanted`."""
    a, b = _flatten(to_json(stored), ""), _flatten(to_json(wanted), "")
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return "; ".join(f"{name}={a.get(name)!r}, not {b.get(name)!r}" for name in names)


def _flatten(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, dict):
        items = [(f"{name}.{key}" if name else key, item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    else:
        return {name: value}
    return {k: v for key, item in items for k, v in _flatten(item, key).items()}
