"""Configs survive JSON, and JSON that is not one of them is refused by name."""

import dataclasses
import json
from typing import Literal

import pytest

from moejax.checkpoint.config_json import difference, from_json, to_json
from moejax.core.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    width: int
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float
    layers: tuple[Inner, ...]
    pair: tuple[int, str] = (1, "x")
    extra: Inner | None = None
    flag: bool = False


CONFIG = Outer(rate=0.1, layers=(Inner(width=1), Inner(width=2, kind="b")), extra=Inner(width=3))


@pytest.mark.parametrize("config", [CONFIG, Outer(rate=1.0, layers=())])
def test_round_trip(config):
    assert from_json(Outer, json.loads(json.dumps(to_json(config))), "outer") == config


@pytest.mark.parametrize(
    "path,value,message",
    [
        (("layers", 1, "width"), "2", "outer.layers[1].width wants int, got '2'"),
        (("layers", 0, "kind"), "c", "outer.layers[0].kind wants Literal['a', 'b'], got 'c'"),
        (("layers",), 5, "outer.layers wants a list, got 5"),
        (("pair",), [1], "outer.pair wants 2 items, got 1"),
        (("flag",), 1, "outer.flag wants bool, got 1"),
        (("extra",), [], "outer.extra wants an object of Inner, got []"),
        (("more",), 1, "outer: Outer has no field 'more'"),
    ],
)
def test_refuses_by_name(path, value, message):
    stored = json.loads(json.dumps(to_json(CONFIG)))
    node = stored
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    with pytest.raises(InputError) as error:
        from_json(Outer, stored, "outer")
    assert str(error.value) == message


def test_refuses_missing_fields():
    with pytest.raises(InputError, match="outer: Outer lacks field 'extra', 'flag'"):
        from_json(Outer, dict(rate=1.0, layers=[], pair=[1, "x"]), "outer")


def test_difference_names_fields():
    other = dataclasses.replace(CONFIG, rate=0.2, layers=(Inner(width=1), Inner(width=9)))
    assert difference(CONFIG, other) == (
        "rate=0.1, not 0.2; layers[1].width=2, not 9; layers[1].kind='b', not 'a'"
    )
