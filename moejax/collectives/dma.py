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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.collectives.lower import mesh_numbers, run_schedule
from moejax.collectives.plan import Message, Plan, make_plan
from moejax.collectives.schedule import Schedule
from moejax.core.errors import check

LOGICAL = pl.DeviceIdType.LOGICAL
LANES, MOST_BYTES = 128, 12 * 2**20  # of vector memory, of 16 MiB that a kernel gets by default
COMBINE = {"add": jnp.add, "max": jnp.maximum, "xor": jnp.bitwise_xor}


@dataclasses.dataclass(frozen=True)
class _Tables:
    """Per rank, int32: start rows in order, rows sent, rows combined with, peers, result."""

    order: np.ndarray  # [R, C]
    sent: np.ndarray  # [R, rows of all messages]
    held: np.ndarray  # the same; unused places are 0
    peers: np.ndarray  # [R, messages, 2]: whether it sends, and to which device
    waits: np.ndarray  # [R, messages]: whether something lands
    result: np.ndarray  # [R, chunks at the end]


def run_by_dma(
    schedule: Schedule,
    x: jax.Array,
    *,
    collective_id: int = 0,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Executes the schedule on chunks x [C, n], as `run_schedule` does; inside `shard_map`.

    Its gradient travels by `run_schedule`.

    Args:
        schedule: without codecs, over all axes of the mesh.
        x: n a multiple of 128.
        collective_id: different for kernels that run at the same time.
        interpret: runs on CPU devices, by Pallas's interpreter.

    Raises `InputError` for what it does not take, such as more values than 12 MiB.
    """
    plan = _check_fits(schedule, x)
    run = functools.partial(_run, schedule, plan, collective_id=collective_id, interpret=interpret)

    @jax.custom_vjp
    def call(x):
        return run(x)

    def backward(x, cotangent):
        return jax.vjp(lambda x: run_schedule(schedule, x)[0], x)[1](cotangent)

    call.defvjp(lambda x: (run(x), x), backward)
    return call(x)


def _run(schedule: Schedule, plan: Plan, x: jax.Array, *, collective_id: int, interpret: Any):
    tables = _tables(schedule, plan)
    values = len(plan.order[0]) + sum(one.width for step in plan.steps for one in step)
    rank, rows = lax.axis_index(schedule.axes), x.shape[1] // LANES
    mine = [lax.dynamic_index_in_dim(t, rank, keepdims=False) for t in dataclasses.astuple(tables)]
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


def _kernel(plan, ranks, order, sent, held, peers, waits, result, x, out, values, sends, lands):
    _meet_all(ranks)
    for row in range(x.shape[0]):
        values[row] = x[order[row]]
    first, row, number = x.shape[0], 0, 0
    for step in plan.steps:
        going, base = [], first
        for message in step:
            going.append((message, number, base, row))
            _send(message, peers, sent, values, sends, lands, number, base, row)
            number, base, row = number + 1, base + message.width, row + message.width
        for message, number_, base_, row_ in going:
            _land(message, peers, waits, values, sends, lands, number_, base_)
            if message.held is not None:
                for k in range(message.width):
                    old = values[held[row_ + k]]
                    values[base_ + k] = COMBINE[message.combine](values[base_ + k], old)
        first = base
    for row in range(out.shape[0]):
        out[row] = values[result[row]]


def _meet_all(ranks: int) -> None:
    """Waits until all ranks have entered the kernel: before, their memory is another program's."""
    barrier = pltpu.get_barrier_semaphore()
    for device in range(ranks):
        pl.semaphore_signal(barrier, 1, device_id=device, device_id_type=LOGICAL)
    pl.semaphore_wait(barrier, ranks)


def _copy(peers, values, sends, lands, number, source, target):
    return pltpu.make_async_remote_copy(
        values.at[source],
        values.at[target],
        sends.at[number],
        lands.at[number],
        device_id=peers[number, 1],
        device_id_type=LOGICAL,
    )


def _send(message, peers, sent, values, sends, lands, number, base, row) -> None:
    @pl.when(peers[number, 0].astype(jnp.bool_))
    def _():
        for k in range(message.width):
            place = sent[row + k]
            _copy(peers, values, sends, lands, number, place, base + k).start()


def _land(message, peers, waits, values, sends, lands, number, base) -> None:
    # Only the sizes count in a wait, and all rows are of one size.
    @pl.when(waits[number].astype(jnp.bool_))
    def _():
        for k in range(message.width):
            place = base + k
            _copy(peers, values, sends, lands, number, place, place).wait_recv()

    @pl.when(peers[number, 0].astype(jnp.bool_))
    def _():
        for k in range(message.width):
            place = base + k
            _copy(peers, values, sends, lands, number, place, place).wait_send()


def _tables(schedule: Schedule, plan: Plan) -> _Tables:
    messages: list[Message] = [one for step in plan.steps for one in step]
    ranks, device = schedule.num_ranks, mesh_numbers(schedule)
    peers = np.zeros((ranks, len(messages), 2), np.int32)
    waits = np.zeros((ranks, len(messages)), np.int32)
    for number, message in enumerate(messages):
        for src, dst in message.pairs:
            peers[src, number] = 1, device[dst]
            waits[dst, number] = 1
    zeros = [((0,) * one.width,) * ranks for one in messages]
    held = [one.held or zero for one, zero in zip(messages, zeros, strict=True)]
    return _Tables(
        order=np.array(plan.order, np.int32),
        sent=np.concatenate([np.array(one.sent, np.int32) for one in messages], 1),
        held=np.concatenate([np.array(one, np.int32) for one in held], 1),
        peers=peers,
        waits=waits,
        result=np.array(plan.result, np.int32),
    )


def _check_fits(schedule: Schedule, x: jax.Array) -> Plan:
    check(not schedule.native and len(schedule.steps) > 0, "only schedules with steps run by DMA")
    mesh = jax.sharding.get_abstract_mesh()
    whole = set(schedule.axes) == {axis for axis in mesh.axis_names if mesh.shape[axis] > 1}
    check(whole, f"the schedule is over {schedule.axes}, the mesh has {dict(mesh.shape)}")
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
