"""`jax.lax.ragged_all_to_all` as one TPU kernel of remote DMA, with the same arguments.

Pallas copies slices of sizes that are known when it compiles. A slice of s rows is therefore sent
as the powers of two in s, the largest first: at most 1 + log2 s DMAs, all of them in flight at
once. Nothing is padded on the wire.

Letters:
    R  ranks    T  rows of the operand    D  elements of a row
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.collectives.dma import LANES, LOGICAL, Interpret, group_devices, interpreter, meet
from moejax.core.errors import check

Sizes = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def ragged_all_to_all_dma(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
    collective_id: int = 1,
    interpret: Interpret = None,
) -> jax.Array:
    """`output` [T', D] with the rows that ranks send each other; inside `shard_map`.

    Args:
        operand: [T, D], D a multiple of 128.
        input_offsets, send_sizes: int32 [R], of the rows for each rank.
        output_offsets: int32 [R], where they go in that rank's output.
        recv_sizes: int32 [R], of the rows from each rank.
        collective_id: different for kernels that run at the same time.
        interpret: by Pallas's interpreter, with these parameters; None: on CPU devices only.

    Offsets and sizes must fit: nothing is checked at run time. Cost: the rows that are sent.
    """
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    _check_fits(operand, output, (input_offsets, send_sizes, output_offsets, recv_sizes), axes)

    run = functools.partial(_run, axes, collective_id, interpreter(interpret))

    @jax.custom_vjp
    def call(operand, output, sizes):
        return run(operand, output, sizes)

    def forward(operand, output, sizes):
        return run(operand, output, sizes), (operand, sizes)

    def backward(saved, cotangent):
        operand, (starts, sent, targets, received) = saved
        swap = functools.partial(
            lax.all_to_all, axis_name=axis_name, split_axis=0, concat_axis=0, tiled=True
        )
        back = (swap(targets), received, swap(starts), sent)
        rows = jnp.arange(cotangent.shape[0])[:, None]
        landed = (rows >= back[0][None]) & (rows < (back[0] + received)[None])
        kept = jnp.where(landed.any(1, keepdims=True), jnp.zeros_like(cotangent), cotangent)
        return run(cotangent, jnp.zeros_like(operand), back), kept, None

    call.defvjp(forward, backward)
    return call(operand, output, (input_offsets, send_sizes, output_offsets, recv_sizes))


def _run(axes, collective_id, interpret, operand, output, sizes: Sizes) -> jax.Array:
    starts, sent, targets, received = sizes
    bits = min(operand.shape[0], output.shape[0]).bit_length()
    ranks, rank, group = lax.axis_size(axes), lax.axis_index(axes), group_devices(axes)
    shift = jnp.arange(ranks, dtype=jnp.int32)
    peer, source = (rank + shift) % ranks, (rank - shift) % ranks
    tables = (
        group[peer],
        *_pieces(starts[peer], targets[peer], sent[peer], bits),
        _pieces(starts[source], starts[source], received[source], bits)[0],
    )
    columns = operand.shape[1] // LANES
    blocks = [x.reshape(-1, columns, LANES) for x in (operand, output)]
    varying = jax.typeof(blocks[1]).manual_axis_type
    out = pl.pallas_call(
        functools.partial(_kernel, ranks, bits),
        out_shape=jax.ShapeDtypeStruct(blocks[1].shape, output.dtype, manual_axis_type=varying),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(tables)
        + [pl.BlockSpec(memory_space=pl.ANY)] * 2,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        input_output_aliases={len(tables) + 1: 0},
        scratch_shapes=[pltpu.SemaphoreType.DMA((ranks,)), pltpu.SemaphoreType.DMA((ranks,))],
        compiler_params=pltpu.CompilerParams(collective_id=collective_id, has_side_effects=True),
        interpret=interpret,
    )(*tables, *blocks)
    return out.reshape(output.shape)


def _pieces(starts, targets, sizes, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int32 [R, bits] each: whether 2 ** bit rows are part of a slice, from where, to where."""
    bit = jnp.arange(bits, dtype=jnp.int32)[None]
    sizes = sizes[:, None]
    before = (sizes >> (bit + 1)) << (bit + 1)
    return sizes >> bit & 1, starts[:, None] + before, targets[:, None] + before


def _kernel(ranks, bits, peer, sends, source, target, lands, operand, output, out, sem, landed):
    # Nothing in here may meet a constant: Mosaic lowers no marks of varying axes.
    del output  # the same memory as `out`
    meet(peer, ranks)

    def copy(shift: int, bit: int) -> Any:
        here = operand.at[pl.ds(source[shift, bit], 2**bit)]
        there = out.at[pl.ds(target[shift, bit], 2**bit)]
        if shift == 0:
            return pltpu.make_async_copy(here, there, sem.at[0])
        return pltpu.make_async_remote_copy(
            here, there, sem.at[shift], landed.at[shift],
            device_id=peer[shift], device_id_type=LOGICAL,
        )  # fmt: skip

    def wait_until_gone(shift: int, bit: int) -> None:
        one = copy(shift, bit)
        one.wait() if shift == 0 else one.wait_send()

    def wait_for(shift: int, bit: int) -> None:
        if shift:  # what stays is here
            copy(shift, bit).wait_recv()

    def each(flags, act) -> None:
        for shift in range(ranks):
            for bit in range(bits):
                pl.when(flags[shift, bit].astype(jnp.bool_))(functools.partial(act, shift, bit))

    each(sends, lambda shift, bit: copy(shift, bit).start())
    each(sends, wait_until_gone)
    each(lands, wait_for)


def _check_fits(operand, output, sizes: Sizes, axes: tuple[str, ...]) -> None:
    ranks = lax.axis_size(axes)
    width = operand.shape[1:] == output.shape[1:] and operand.ndim == 2
    check(
        width and operand.shape[1] % LANES == 0 and operand.dtype == output.dtype,
        f"rows of a multiple of {LANES} elements want [T, D], got operand {operand.shape} "
        f"{operand.dtype}, output {output.shape} {output.dtype}",
    )
    for one in sizes:
        check(
            one.shape == (ranks,) and one.dtype == jnp.int32,
            f"offsets and sizes want int32 [{ranks}], got {one.dtype} {one.shape}",
        )
