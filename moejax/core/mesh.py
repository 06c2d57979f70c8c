"""The one place that creates meshes, with explicit axis types.

Axis names: `data`, `expert`, `model` (`context` and `pipe` are reserved). `jax.make_mesh` defaults
to Explicit axes in jax 0.10.2, so the type is always passed.
"""

from typing import Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from moejax.core.errors import check

AXES = ("data", "expert", "model")


def make_mesh(
    *,
    data: int = 1,
    expert: int = 1,
    model: int = 1,
    axis_type: Literal["auto", "explicit"] = "auto",
    devices: list[jax.Device] | None = None,
) -> Mesh:
    """Mesh of shape (data, expert, model) over the first `data * expert * model` devices.

    Raises `InputError` when there are fewer devices than that.
    """
    for axis, size in zip(AXES, (data, expert, model), strict=True):
        check(size >= 1, f"mesh axis {axis}={size} must be at least 1")
    kinds = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    check(axis_type in kinds, f"axis_type={axis_type!r} is not one of {list(kinds)}")
    devices = list(jax.devices()) if devices is None else list(devices)
    size = data * expert * model
    check(
        size <= len(devices),
        f"mesh data={data} expert={expert} model={model} wants {size} devices, "
        f"found {len(devices)}",
    )
    grid = np.array(devices[:size]).reshape(data, expert, model)
    return Mesh(grid, AXES, axis_types=(kinds[axis_type],) * 3)


def check_divisible(num_experts: int, mesh: Mesh) -> int:
    """Experts per rank on the `expert` axis; raises `InputError` when they do not divide."""
    ranks = mesh.shape["expert"]
    check(
        num_experts % ranks == 0,
        f"num_experts={num_experts} is not divisible by expert axis size {ranks}",
    )
    return num_experts // ranks
