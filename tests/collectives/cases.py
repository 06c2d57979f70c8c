"""Every operation's native counterpart in `jax.lax`, and functions over the ranks of a mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from moejax.collectives.builders import BUILDERS
from moejax.collectives.schedule import Schedule, Step, Transfer
from moejax.core.mesh import make_mesh


def _varying(x, axes):
    return lax.pcast(x, axes, to="varying")


def _broadcast(x, axes):
    here = lax.axis_index(axes) == 0
    return _varying(lax.psum(jnp.where(here, x, jnp.zeros_like(x)), axes), axes)


def _parity(x, axes):
    """Of whole numbers [R - 1, ...]: every rank looks at all pieces."""
    rank, ranks = lax.axis_index(axes), lax.axis_size(axes)
    pieces = lax.all_gather(x, axes)
    parity = jnp.zeros_like(x[:1])
    for other in range(ranks):
        index = jnp.where(other < rank, rank - 1, rank) % (ranks - 1)
        mine = pieces[other, index][None]
        parity = jnp.where(other == rank, parity, parity ^ mine)
    return parity


NATIVE: dict[str, Callable] = {
    "all_reduce": lambda x, axes: _varying(lax.psum(x, axes), axes),
    "reduce_scatter": lambda x, axes: lax.psum_scatter(x, axes, tiled=True),
    "all_gather": lambda x, axes: lax.all_gather(x, axes, tiled=True),
    "all_to_all": lambda x, axes: lax.all_to_all(x, axes, 0, 0, tiled=True),
    "round_trip": lambda x, axes: x,
    "broadcast": _broadcast,
    "parity": _parity,
}


def grids(name: str, candidates: list[dict[str, int]]) -> list[dict[str, int]]:
    """Those of the candidates that a builder takes."""
    builder, taken = BUILDERS[name], []
    for axes in candidates:
        ranks = 1
        for size in axes.values():
            ranks *= size
        whole = not builder.power_of_two or ranks & (ranks - 1) == 0
        enough = ranks > 1 or builder.operation != "parity"
        if whole and enough and builder.num_axes in (None, len(axes)):
            taken.append(axes)
    return taken


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


def over(fn: Callable, axes: dict[str, int], axis_type: str = "auto") -> tuple[Callable, jax.Array]:
    """(jitted fn over a mesh, the sharding of its rows), rows over all axes."""
    mesh = make_mesh(**axes, axis_type=axis_type)
    spec = PartitionSpec(tuple(axes))
    run = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec))
    return run, NamedSharding(mesh, spec)


def sharded(fn: Callable, axes: dict[str, int], rows: int, axis_type: str = "auto"):
    """(jitted fn over the mesh, an input of `rows` rows of 3 per rank, the mesh)."""
    run, sharding = over(fn, axes, axis_type)
    size = rows * sharding.mesh.size
    x = jax.random.normal(jax.random.key(1), (size, 3), jnp.float32)
    return run, jax.device_put(x, sharding), sharding.mesh


def whole_numbers(shape, sharding):
    """Rows of four dtypes, so small that no sum rounds."""
    numbers = np.random.default_rng(0).integers(-4, 5, shape)
    dtypes = (jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8)
    return {jnp.dtype(d).name: jax.device_put(jnp.asarray(numbers, d), sharding) for d in dtypes}


def value_and_gradient(fn, x):
    """Values of all, gradients of the floating ones, by cotangents that differ everywhere."""
    floating = {k: leaf for k, leaf in x.items() if "float" in k}
    y, pullback = jax.vjp(lambda part: fn(x | part), floating)
    ones = {k: jnp.where(y[k] % 2 == 0, 1, -1).astype(y[k].dtype) for k in floating}
    zeros = {k: np.zeros(y[k].shape, jax.dtypes.float0) for k in y if k not in floating}
    return y, pullback(ones | zeros)[0]


def races_found() -> bool:
    """Whether Pallas's interpreter saw a race since the process began."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # no public way

    return interpret_pallas_call.races.races_found
