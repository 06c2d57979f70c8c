"""All-gather and reduce-scatter by the switch between GPUs, a kernel each.

jax keeps both (`jax.experimental.pallas.ops.gpu`, NVLink SHARP): a device stores its rows once, to
an address that the switch copies to all, or loads sums that the switch has added. Here they take
rows of any shape that fits, have gradients, which are each other, and say what they refuse. They
stand beside the compiler's own collectives and are compiled for Hopper and later only.

Letters:
    R  ranks    T  rows of a rank
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moejax.core.errors import check
from moejax.kernels.vma import vary_over

# The threads of a warpgroup, each with the 16 bytes that one instruction moves.
TRANSFER_BYTES = 128 * 16
# Blocks of a kernel: a multiprocessor of an H100 or H200 each. More than there are take turns.
NUM_BLOCKS = 132
MOST_TRANSFERS = 8  # unrolled, as jax's kernels do when not told
DTYPES = ("bfloat16", "float16", "float32")


def multicast_all_gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[R * T, ...]: rows x [T, ...] of all ranks, in their order; inside `shard_map`.

    Args:
        axes: all axes of the mesh with more than one device.

    Raises `InputError` for other axes, dtypes, and rows that are not whole transfers of 2048 bytes.
    Cost: every device sends its rows once, whatever R is.
    """
    names = _check_fits(x, axes, x.size)

    @jax.custom_vjp
    def gather(x):
        return _all_gather(x, axes, names)

    gather.defvjp(lambda x: (gather(x), None), lambda _, y: (_reduce_scatter(y, axes, names),))
    return gather(vary_over(axes, x))


def multicast_reduce_scatter(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[T, ...]: this rank's rows of the sum of x [R * T, ...] over ranks; inside `shard_map`.

    Arguments and errors of `multicast_all_gather`. The switch adds, in an order of its own. Cost:
    every device receives its rows once.
    """
    ranks = lax.axis_size(axes)
    check(x.shape[0] % ranks == 0, f"{x.shape[0]} rows are not divisible by {ranks} ranks")
    names = _check_fits(x, axes, x.size // ranks)

    @jax.custom_vjp
    def scatter(x):
        return _reduce_scatter(x, axes, names)

    scatter.defvjp(lambda x: (scatter(x), None), lambda _, y: (_all_gather(y, axes, names),))
    return scatter(vary_over(axes, x))


def _all_gather(x: jax.Array, axes: tuple[str, ...], names: tuple[str, ...]) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.all_gather_mgpu import all_gather  # long to import

    rows = all_gather(x.reshape(-1), axis_name=names, **_sizes(x.size, x.dtype))
    return vary_over(axes, rows.reshape(-1, *x.shape[1:]))


def _reduce_scatter(x: jax.Array, axes: tuple[str, ...], names: tuple[str, ...]) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.reduce_scatter_mgpu import reduce_scatter

    own = x.size // lax.axis_size(axes)
    rows = reduce_scatter(x.reshape(-1), axis_name=names, **_sizes(own, x.dtype))
    return vary_over(axes, rows.reshape(-1, *x.shape[1:]))


def _sizes(elements: int, dtype: Any) -> dict[str, Any]:
    """Blocks and elements of a tile, which must divide a rank's rows."""
    transfer = TRANSFER_BYTES // jnp.dtype(dtype).itemsize
    unrolled = math.gcd(elements // transfer, MOST_TRANSFERS)
    return {"num_blocks": NUM_BLOCKS, "tile_size": unrolled * transfer}


def _check_fits(x: jax.Array, axes: tuple[str, ...], elements: int) -> tuple[str, ...]:
    """All axis names of the mesh, which the kernels want, where they fit."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = [name for name in mesh.axis_names if mesh.shape[name] > 1 and name not in axes]
    check(not whole, f"multicast reaches all devices, axes {axes} leave out {whole}")
    check(x.dtype.name in DTYPES, f"multicast takes {', '.join(DTYPES)}, not {x.dtype.name}")
    nbytes = elements * x.dtype.itemsize
    check(
        nbytes > 0 and nbytes % TRANSFER_BYTES == 0,
        f"rows of a rank, {elements} {x.dtype.name}, are no whole transfers of "
        f"{TRANSFER_BYTES} bytes",
    )
    return mesh.axis_names
