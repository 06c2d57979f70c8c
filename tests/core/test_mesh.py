"""Meshes with explicit axis types."""

import jax
import pytest
from jax.sharding import AxisType

from moejax.core.errors import InputError
from moejax.core.mesh import AXES, check_divisible, make_mesh


@pytest.mark.parametrize(
    ("axis_type", "kind"), [("auto", AxisType.Auto), ("explicit", AxisType.Explicit)]
)
def test_shape_order_and_axis_types(axis_type, kind):
    mesh = make_mesh(data=2, expert=3, model=1, axis_type=axis_type)
    assert dict(mesh.shape) == {"data": 2, "expert": 3, "model": 1}
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (kind,) * 3
    # The expert axis runs over neighbouring devices.
    assert [d.id for d in mesh.devices[1, :, 0]] == [3, 4, 5]


def test_the_default_is_one_device_of_auto_type():
    mesh = make_mesh()
    assert mesh.size == 1 and mesh.axis_types == (AxisType.Auto,) * 3


def test_devices_can_be_given():
    last = jax.devices()[-2:]
    assert list(make_mesh(expert=2, devices=last).devices.flat) == last


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(data=3, expert=3), "mesh data=3 expert=3 model=1 wants 9 devices, found 8"),
        (dict(expert=0), "mesh axis expert=0 must be at least 1"),
        (dict(data=-1, expert=-1), "mesh axis data=-1 must be at least 1"),
        (dict(axis_type="manual"), "axis_type='manual' is not one of"),
    ],
)
def test_wrong_sizes_are_refused_with_their_numbers(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(**sizes)


def test_experts_must_divide_over_the_expert_axis():
    mesh = make_mesh(data=2, expert=4)
    assert check_divisible(12, mesh) == 3
    with pytest.raises(InputError, match="num_experts=6 is not divisible by expert axis size 4"):
        check_divisible(6, mesh)
