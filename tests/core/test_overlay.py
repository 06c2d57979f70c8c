"""Command-line overrides of frozen configs."""

import dataclasses
from typing import Literal

import pytest

from moejax.core.errors import InputError, check
from moejax.core.overlay import overlay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    experts: int = 8
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        check(self.experts % 2 == 0, f"experts={self.experts} is odd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = Inner()
    spare: Inner | None = None
    lr: float = 0.1
    decay: float | None = None
    betas: tuple[float, ...] = (0.9, 0.99)
    shape: tuple[int, str] = (1, "x")
    name: str = "run"
    flag: bool = False
    steps: int = 3
    level: Literal[1, 2] = 1


@pytest.mark.parametrize(
    ("assignment", "field", "want"),
    [
        ("lr=1", "lr", 1.0),
        ("lr=2.5e-3", "lr", 0.0025),
        ("decay=2", "decay", 2.0),
        ("decay=None", "decay", None),
        ("betas=(1, 0.5, 0)", "betas", (1.0, 0.5, 0.0)),
        ("betas=()", "betas", ()),
        ("shape=(2, 'y')", "shape", (2, "y")),
        ("name=a b", "name", "a b"),
        ("name=x=y", "name", "x=y"),
        ("name={[]: 1}", "name", "{[]: 1}"),
        ("name='7'", "name", "7"),
        ("flag=True", "flag", True),
        ("steps=-4", "steps", -4),
        ("level=2", "level", 2),
        ("inner.experts=64", "inner", Inner(experts=64)),
        ("inner.kind=b", "inner", Inner(kind="b")),
    ],
)
def test_one_field_is_replaced_and_keeps_its_type(assignment, field, want):
    changed = overlay(Outer(), [assignment])
    got = getattr(changed, field)
    assert got == want and type(got) is type(want)
    if isinstance(want, tuple):
        assert [type(item) for item in got] == [type(item) for item in want]
    assert dataclasses.replace(changed, **{field: getattr(Outer(), field)}) == Outer()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("lr", "--set 'lr' has no '='"),
        ("rate=1", "--set rate: Outer has no field 'rate'; has ['betas', 'decay', 'flag',"),
        ("inner.width=1", "--set inner.width: Inner has no field 'width'; has ['experts', 'kind']"),
        ("lr.x=1", "--set lr.x: float value has no field 'x'"),
        ("spare.experts=2", "--set spare.experts: NoneType value has no field 'experts'"),
        ("=1", "Outer has no field ''"),
        ("lr=fast", "--set lr wants float, got 'fast'"),
        ("lr=True", "--set lr wants float, got True"),
        ("lr=", "--set lr wants float, got ''"),
        ("lr=1" + "0" * 400, "--set lr wants float, got 1"),
        ("steps=1.0", "--set steps wants int, got 1.0"),
        ("steps=True", "--set steps wants int, got True"),
        ("steps=None", "--set steps wants int, got None"),
        ("flag=1", "--set flag wants bool, got 1"),
        ("name=7", "--set name wants str, got 7"),
        ("level=True", "--set level wants Literal[1, 2], got True"),
        ("level=3", "--set level wants Literal[1, 2], got 3"),
        ("inner.kind=c", "--set inner.kind wants Literal['a', 'b'], got 'c'"),
        ("inner=4", "--set inner wants Inner, got 4; set inner.experts, inner.kind"),
        ("lr=1e999", "--set lr wants float, got inf"),
        ("betas=0.9", "--set betas wants tuple[float, ...], got 0.9"),
        ("betas=(0.9, 'x')", "--set betas wants tuple[float, ...], got (0.9, 'x')"),
        ("shape=(2,)", "--set shape wants tuple[int, str], got (2,)"),
        ("decay=x", "--set decay wants float | None, got 'x'"),
        ("inner.experts=7", "--set inner.experts: experts=7 is odd"),
    ],
)
def test_a_wrong_assignment_is_one_clear_line(assignment, message):
    with pytest.raises(InputError) as error:
        overlay(Outer(), [assignment])
    assert message in str(error.value) and "\n" not in str(error.value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    sizes: tuple[int, ...] = (1, 16)
    counts: tuple[int, ...] = (9, 3)

    def __post_init__(self):
        check(len(self.sizes) == len(self.counts), f"{self.sizes} and {self.counts} differ")


def test_fields_that_depend_on_each_other_change_together():
    assert overlay(Pair(), ["sizes=(2,)", "counts=(5,)"]) == Pair(sizes=(2,), counts=(5,))
    with pytest.raises(InputError, match=r"^--set sizes, counts: \(2,\) and \(5, 6\) differ$"):
        overlay(Pair(), ["sizes=(2,)", "counts=(5, 6)"])


def test_assignments_apply_in_order_and_leave_the_original_alone():
    config = Outer()
    changed = overlay(config, ["inner.experts=4", "lr=2", "inner.experts=6"])
    assert changed == Outer(inner=Inner(experts=6), lr=2.0)
    assert config == Outer()
    assert overlay(config, []) is config
