"""One all-to-all, in the lowerings that a backend may prefer.

`native` is the compiler's own. `shifted` is R - 1 permutes that wait for nothing but their data,
`dma` the same schedule as one TPU kernel of remote DMA, for short messages (`moejax.collectives`).
CPU devices interpret that kernel.

Axis letters:
    R  ranks on the axis
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from moejax.collectives.builders import shifted_all_to_all
from moejax.collectives.lower import run_schedule
from moejax.collectives.schedule import Schedule
from moejax.core.errors import check
from moejax.dispatch.ranks import Axis, axis_names

Lowering = Literal["native", "shifted", "dma"]
LOWERINGS: tuple[str, ...] = get_args(Lowering)


def check_lowering(lowering: str) -> None:
    """Raises `InputError` for a name that is not one of `LOWERINGS`."""
    check(lowering in LOWERINGS, f"lowering={lowering!r} is not one of {LOWERINGS}")


def exchange(x: jax.Array, axis: Axis, lowering: Lowering = "native") -> jax.Array:
    """Row r of x [R, ...] to rank r of `axis`; returns [R, ...], row s being what rank s sent.

    Ranks of several axes count in the order of the mesh. Applied twice it is the identity, and its
    gradient is itself. Cost: R - 1 rows per rank on the wire; by `dma` each filled up to a multiple
    of 128 elements, and all that a rank sends and gets must fit into vector memory together.
    """
    check_lowering(lowering)
    if lowering == "native":
        return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)
    schedule = shifted_all_to_all({name: jax.lax.axis_size(name) for name in axis_names(axis)})
    return _by_dma(schedule, x) if lowering == "dma" else run_schedule(schedule, x)[0]


def _by_dma(schedule: Schedule, x: jax.Array) -> jax.Array:
    from moejax.collectives.dma import LANES, run_by_dma  # Pallas takes long to import

    rows = x.reshape(x.shape[0], -1)
    width = rows.shape[1]
    filled = jnp.pad(rows, ((0, 0), (0, -width % LANES)))
    return run_by_dma(schedule, filled)[:, :width].reshape(x.shape)
