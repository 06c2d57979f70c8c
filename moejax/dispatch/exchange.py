"""One all-to-all, in the lowerings that a backend may prefer.

`native` is the compiler's own. `shifted` is R - 1 permutes that wait for nothing but their data
(`moejax.collectives`).

Axis letters:
    R  ranks on the axis
"""

from typing import Literal, get_args

import jax

from moejax.collectives.builders import shifted_all_to_all
from moejax.collectives.lower import run_schedule
from moejax.core.errors import check
from moejax.dispatch.ranks import Axis, axis_names

Lowering = Literal["native", "shifted"]
LOWERINGS: tuple[str, ...] = get_args(Lowering)


def check_lowering(lowering: str) -> None:
    """Raises `InputError` for a name that is not one of `LOWERINGS`."""
    check(lowering in LOWERINGS, f"lowering={lowering!r} is not one of {LOWERINGS}")


def exchange(x: jax.Array, axis: Axis, lowering: Lowering = "native") -> jax.Array:
    """Row r of x [R, ...] to rank r of `axis`; returns [R, ...], row s being what rank s sent.

    Ranks of several axes count in the order of the mesh. Applied twice it is the identity, and its
    gradient is itself. Cost: R - 1 rows per rank on the wire.
    """
    check_lowering(lowering)
    if lowering == "native":
        return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)
    schedule = shifted_all_to_all({name: jax.lax.axis_size(name) for name in axis_names(axis)})
    return run_schedule(schedule, x)[0]
