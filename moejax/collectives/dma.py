"""Any schedule as one TPU kernel: chunks travel by remote DMA. Stands beside `lower`'s permutes.

The kernel holds the values of the plan (`collectives.plan`) in vector memory: start rows first,
then what lands, step by step. Every place is written once, so no rank waits for room at another:
only for what it is sent, and once, at the start, until all ranks have arrived. Who sends what to
whom is read from a table; the program is the same on all ranks.

It is for latency: a step costs a DMA instead of a permute's start and end, and nothing of it goes
through the scheduler. What XLA should overlap with other work belongs to `lower`.

Letters:
    C  chunks that a rank starts with    V  values    n  elements of a chunk    R  ranks
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.collectives.lower import check_sizes, run_schedule
from moejax.collectives.plan import Message, Plan, make_plan
from moejax.collectives.schedule import Schedule
from moejax.core.errors import check

Interpret = bool | pltpu.InterpretParams | None
LOGICAL = pl.DeviceIdType.LOGICAL
LANES, MOST_BYTES = 128, 12 * 2**20  # of vector memory, of 16 MiB that a kernel gets by default
COMBINE = {"add": jnp.add, "max": jnp.maximum, "xor": jnp.bitwise_xor}


@dataclasses.dataclass(frozen=True)
class _Tables:
    """Per rank, int32: start rows in order, rows sent, rows combined with, peers, result."""

    order: np.ndarray  # [R, C]
    sent: np.ndarray  # [R, rows of all messages]
    held: np.ndarray  # the same; unused places are 0
    peers: np.ndarray  # [R, messages]: the rank that it sends to
    sends: np.ndarray  # [R, messages]: whether it does
    waits: np.ndarray  # [R, messages]: whether something lands
    result: np.ndarray  # [R, chunks at the end]


def run_by_dma(
    schedule: Schedule,
    x: jax.Array,
    *,
    collective_id: int = 0,
    interpret: Interpret = None,
) -> jax.Array:
    """Executes the schedule on chunks x [C, n], as `run_schedule` does; inside `shard_map`.

    Its gradient travels by `run_schedule`.

    Args:
        schedule: without codecs.
        x: n a multiple of 128.
        collective_id: different for kernels that run at the same time.
        interpret: by Pallas's interpreter, with these parameters; None: on CPU devices only.

    Raises `InputError` for what it does not take, such as more values than 12 MiB.
    """
    plan = _check_fits(schedule, x)

    def run(x):
        return _run(schedule, plan, x, collective_id, interpreter(interpret))

    @jax.custom_vjp
    def call(x):
        return run(x)

    def backward(x, cotangent):
        return jax.vjp(lambda x: run_schedule(schedule, x)[0], x)[1](cotangent)

    call.defvjp(lambda x: (run(x), x), backward)
    return call(x)


def interpreter(interpret: Interpret) -> bool | pltpu.InterpretParams:
    """What `pallas_call` is told. Refuses meshes of neither TPUs nor CPU devices."""
    if interpret is not None:
        return interpret
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    check(platform in ("tpu", "cpu"), f"remote DMA wants TPUs, this is a mesh of {platform}")
    return pltpu.InterpretParams() if platform == "cpu" else False


def group_devices(axes: tuple[str, ...]) -> jax.Array:
    """int32 [R], by rank: the devices with this one's coordinates on all axes but these.

    Numbers are those of Pallas's logical ids: devices in the order of the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    others = tuple(name for name in mesh.axis_names if name not in axes and mesh.shape[name] > 1)
    sizes = [mesh.shape[name] for name in mesh.axis_names]
    ids = np.arange(math.prod(sizes), dtype=np.int32).reshape(sizes)
    order = [name for name in mesh.axis_names if name not in (*axes, *others)] + [*others, *axes]
    ids = ids.transpose([mesh.axis_names.index(name) for name in order])
    groups = ids.reshape(-1, math.prod(mesh.shape[name] for name in axes))
    return lax.dynamic_index_in_dim(groups, lax.axis_index(others), keepdims=False)


def _run(schedule: Schedule, plan: Plan, x: jax.Array, collective_id: int, interpret: Any):
    tables = _tables(schedule, plan)
    values = len(plan.order[0]) + sum(one.width for step in plan.steps for one in step)
    rank, rows = lax.axis_index(schedule.axes), x.shape[1] // LANES
    mine = [lax.dynamic_index_in_dim(t, rank, keepdims=False) for t in dataclasses.astuple(tables)]
    order, sent, held, peers, sends, waits, result = mine
    group = group_devices(schedule.axes)
    mine = [group, order, sent, held, group[peers], sends, waits, result]
    messages = tables.peers.shape[1]
    kernel = functools.partial(_kernel, plan, schedule.num_ranks)
    # Nothing in the kernel may meet a constant: Mosaic lowers no marks of varying axes.
    varying = jax.typeof(x).manual_axis_type
    out_rows = tables.result.shape[1]
    shape = jax.ShapeDtypeStruct((out_rows, rows, LANES), x.dtype, manual_axis_type=varying)
    out = pl.pallas_call(
        kernel,
        out_shape=shape,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(mine)
        + [pl.BlockSpec(memory_space=pltpu.VMEM)],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        scratch_shapes=[
            pltpu.VMEM((values, rows, LANES), x.dtype),
            pltpu.SemaphoreType.DMA((messages,)),
            pltpu.SemaphoreType.DMA((messages,)),
        ],
        compiler_params=pltpu.CompilerParams(collective_id=collective_id, has_side_effects=True),
        interpret=interpret,
    )(*mine, x.reshape(-1, rows, LANES))
    return out.reshape(-1, x.shape[1])


def _kernel(
    plan, ranks, group, order, sent, held, peers, sends, waits, result, x, out, values, gone, lands
):
    meet(group, ranks)
    for row in range(x.shape[0]):
        values[row] = x[order[row]]
    first, row, number = x.shape[0], 0, 0
    for step in plan.steps:
        going, base = [], first
        for message in step:
            copy = functools.partial(_copy, peers, values, gone, lands, number)
            going.append((message, copy, number, base, row))
            _send(message, copy, sends[number], sent, base, row)
            number, base, row = number + 1, base + message.width, row + message.width
        for message, copy, number_, base_, row_ in going:
            _land(message, copy, sends[number_], waits[number_], base_)
            if message.held is not None:
                for k in range(message.width):
                    old = values[held[row_ + k]]
                    values[base_ + k] = COMBINE[message.combine](values[base_ + k], old)
        first = base
    for row in range(out.shape[0]):
        out[row] = values[result[row]]


def meet(group: Any, ranks: int) -> None:
    """Waits until all ranks have entered the kernel: before, their memory is another program's."""
    barrier = pltpu.get_barrier_semaphore()
    for rank in range(ranks):
        pl.semaphore_signal(barrier, 1, device_id=group[rank], device_id_type=LOGICAL)
    pl.semaphore_wait(barrier, ranks)


def _copy(peers, values, gone, lands, number, source, target):
    return pltpu.make_async_remote_copy(
        values.at[source],
        values.at[target],
        gone.at[number],
        lands.at[number],
        device_id=peers[number],
        device_id_type=LOGICAL,
    )


def _send(message, copy, sends, sent, base, row) -> None:
    @pl.when(sends.astype(jnp.bool_))
    def _():
        for k in range(message.width):
            copy(sent[row + k], base + k).start()


def _land(message, copy, sends, waits, base) -> None:
    # Only the sizes count in a wait, and all rows are of one size.
    @pl.when(waits.astype(jnp.bool_))
    def _():
        for k in range(message.width):
            copy(base + k, base + k).wait_recv()

    @pl.when(sends.astype(jnp.bool_))
    def _():
        for k in range(message.width):
            copy(base + k, base + k).wait_send()


def _tables(schedule: Schedule, plan: Plan) -> _Tables:
    messages: list[Message] = [one for step in plan.steps for one in step]
    ranks = schedule.num_ranks
    peers, sends, waits = np.zeros((3, ranks, len(messages)), np.int32)
    for number, message in enumerate(messages):
        for src, dst in message.pairs:
            peers[src, number] = dst
            sends[src, number] = waits[dst, number] = 1
    zeros = [((0,) * one.width,) * ranks for one in messages]
    held = [one.held or zero for one, zero in zip(messages, zeros, strict=True)]
    return _Tables(
        order=np.array(plan.order, np.int32),
        sent=np.concatenate([np.array(one.sent, np.int32) for one in messages], 1),
        held=np.concatenate([np.array(one, np.int32) for one in held], 1),
        peers=peers,
        sends=sends,
        waits=waits,
        result=np.array(plan.result, np.int32),
    )


def _check_fits(schedule: Schedule, x: jax.Array) -> Plan:
    check(not schedule.native and len(schedule.steps) > 0, "only schedules with steps run by DMA")
    check_sizes(schedule)
    rows = len(schedule.start[0])
    check(
        x.ndim == 2 and x.shape[0] == rows and x.shape[1] % LANES == 0,
        f"{rows} chunks of a multiple of {LANES} elements want [{rows}, n], got {x.shape}",
    )
    plan = make_plan(schedule)
    messages = [one for step in plan.steps for one in step]
    coded = any(one.codec is not None for one in messages)
    check(not coded, "schedules with codecs run by `run_schedule` only")
    values = rows + sum(one.width for one in messages)
    nbytes = values * x.shape[1] * x.dtype.itemsize
    check(
        nbytes <= MOST_BYTES,
        f"{values} values of {x.shape[1]} {x.dtype} are {nbytes} bytes, more than {MOST_BYTES}",
    )
    return plan
