"""Every builder with its operation and its native counterpart in `jax.lax`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from moejax.collectives import builders
from moejax.collectives.schedule import Schedule, Step, Transfer
from moejax.core.mesh import make_mesh


def _all_reduce(x, axes):
    return lax.pcast(lax.psum(x, axes), axes, to="varying")


def _reduce_scatter(x, axes):
    return lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True)


def _all_gather(x, axes):
    return lax.all_gather(x, axes, tiled=True)


def _all_to_all(x, axes):
    return lax.all_to_all(x, axes, 0, 0, tiled=True)


@dataclasses.dataclass(frozen=True)
class Case:
    build: Callable[..., Schedule]
    operation: str
    native: Callable


CASES = {
    "ring_reduce_scatter": Case(builders.ring_reduce_scatter, "reduce_scatter", _reduce_scatter),
    "ring_all_gather": Case(builders.ring_all_gather, "all_gather", _all_gather),
    "ring_all_reduce": Case(builders.ring_all_reduce, "all_reduce", _all_reduce),
    "shifted_all_to_all": Case(builders.shifted_all_to_all, "all_to_all", _all_to_all),
    "two_level_all_to_all": Case(builders.two_level_all_to_all, "all_to_all", _all_to_all),
}
ONE_AXIS = [name for name in CASES if name != "two_level_all_to_all"]
GRIDS = [{"expert": 1}, {"expert": 2}, {"expert": 4}, {"expert": 8}]


def two_rails() -> Schedule:
    """Written by hand: an all-gather of two chunks per rank over 4 ranks, one ring each way."""
    steps = [
        [Transfer(r, (r + 1) % 4, (2 * ((r - s) % 4),), "copy", 0) for r in range(4)]
        + [Transfer(r, (r - 1) % 4, (2 * ((r + s) % 4) + 1,), "copy", 1) for r in range(4)]
        for s in range(3)
    ]
    return Schedule(
        axes=("expert",),
        sizes=(4,),
        num_chunks=8,
        start=tuple((2 * r, 2 * r + 1) for r in range(4)),
        end=(tuple(range(8)),) * 4,
        steps=tuple(Step(tuple(step)) for step in steps),
    )


def sharded(fn: Callable, axes: dict[str, int], rows: int, axis_type: str = "auto"):
    """(jitted fn over the mesh, an input of `rows` rows of 3 per rank), rows over all axes."""
    mesh = make_mesh(**axes, axis_type=axis_type)
    spec = PartitionSpec(tuple(axes))
    wrapped = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec))
    size = rows
    for extent in axes.values():
        size *= extent
    x = jax.random.normal(jax.random.key(1), (size, 3), jnp.float32)
    return wrapped, jax.device_put(x, NamedSharding(mesh, spec)), mesh
