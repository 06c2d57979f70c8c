"""A loop over the processes that are alive: it shrinks when one dies and grows when it is back.

Every process holds the whole state, in host memory between steps. A step runs on the devices that
are alive when it begins, all of whose processes complete it or none (`jax`'s `live_devices`); one
that fails is run again by the others, from the state before it. When membership changes, the most
advanced process hands its state to all: so a process that was started again takes part, from the
next step on, in the very same run. A step must be a function of the global batch, not of the mesh.

Wants `jax.config.update("jax_enable_recoverability", True)` before `jax.distributed.initialize`;
on CPU also `--xla_cpu_collective_timeout_seconds` in XLA_FLAGS: a rank whose neighbour in a
collective has given up waits for it that long. When process 0 dies all die: it is the coordinator,
and JAX has no other.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core.errors import check

AXIS = "data"
TRIES = 2  # failures of a communicator after which another takes its place
Members = tuple[tuple[int, int], ...]  # device ids, each with the incarnation of its process
Live = Callable[[list[jax.Device]], AbstractContextManager[list[jax.Device]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to the run."""

    step: int
    kind: str  # "members", "retry"
    detail: str


def run_alive(
    devices: Sequence[jax.Device],
    state: Any,
    step: Callable[[Mesh, Any, int], Any],
    num_steps: int,
    *,
    first_step: int = 0,
    live: Live = multihost_utils.live_devices,
    notify: Callable[[Event], None] = lambda event: None,
    completed: Callable[[int, Any], None] = lambda step, state: None,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    max_failures: int = 20,
) -> Any:
    """Takes `num_steps` steps in all, in this process or before it joined; the last state.

    Args:
        state: a tree of host arrays, of a fresh run or of a checkpoint; a process that joins later
            passes such a one too, and gets that of the others.
        first_step: steps that led to `state`; the most advanced process is followed.
        step: called as `step(mesh, state, i)` on a mesh with the one axis `data`, over the devices
            that are alive; returns the new state as host arrays, the same on all processes.
        completed: called with the number of steps taken and the state after each.
        guard: entered around what this process does between waiting for others, such as
            `Watchdog.guard`; its limit must be longer than that of a collective.
        notify: told of every change of membership and of every failed step.

    Raises the last error of a step after `max_failures` failures in a row.
    """
    check(num_steps >= 0, f"num_steps={num_steps} must not be negative")
    done, members, failures = first_step, (), 0
    while done < num_steps:
        try:
            with live(list(devices)) as alive, _noting_failures(_members(alive, live)) as now:
                order = np.array(_ordered(alive, *now))
                mesh = Mesh(order, (AXIS,), axis_types=(AxisType.Auto,))
                with guard():
                    if now != members:
                        done, state = hand_over(mesh, done, state)
                        notify(Event(step=done, kind="members", detail=f"{len(alive)} devices"))
                    new = step(mesh, state, done) if done < num_steps else state
        except Exception as error:
            # Which exceptions a dead peer causes depends on the backend; a bug of ours fails again.
            failures += 1
            members = ()
            line = str(error).splitlines()[0] if str(error) else ""
            notify(Event(step=done, kind="retry", detail=f"{type(error).__name__}: {line}"))
            if failures >= max_failures:
                raise
            continue
        members, failures = now, 0
        if done < num_steps:
            state, done = new, done + 1
            completed(done, state)
    return state


def hand_over(mesh: Mesh, done: int, state: Any) -> tuple[int, Any]:
    """Steps and state of the most advanced process, on all of them, bit for bit.

    Cost: what it takes to spread one device's copy of the state.
    """
    steps = np.asarray(_row(_stacked(mesh, np.array([done], np.int32)), None)).reshape(-1)
    first = int(steps.argmax())
    leaves, treedef = jax.tree.flatten(state)
    received = []
    for leaf in leaves:
        bits = np.frombuffer(np.asarray(leaf).tobytes(), np.uint8)
        whole = np.asarray(_row(_stacked(mesh, bits), first)).tobytes()
        received.append(np.frombuffer(whole, leaf.dtype).reshape(leaf.shape).copy())
    return int(steps[first]), treedef.unflatten(received)


def _stacked(mesh: Mesh, row: np.ndarray) -> jax.Array:
    """[D, ...]: a row per device, each process's own."""
    here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    return jax.make_array_from_single_device_arrays(
        (mesh.size, *row.shape),
        NamedSharding(mesh, P(AXIS)),
        [jax.device_put(row[None], device) for device in here],
    )


def _row(stacked: jax.Array, index: int | None) -> jax.Array:
    """One row, or all, on every device."""
    everywhere = NamedSharding(stacked.sharding.mesh, P())  # pyrefly: ignore[missing-attribute]
    pick = (lambda x: x) if index is None else (lambda x: x[index])
    return jax.jit(pick, out_shardings=everywhere)(stacked).addressable_data(0)


def _members(alive: Sequence[jax.Device], live: Live) -> Members:
    # A process that was started again has the same devices in a new incarnation. In jax 0.10.2
    # only the context manager itself knows it.
    incarnations = getattr(live, "devices", None) or {}
    return tuple((device.id, incarnations.get(device, 0)) for device in alive)


@contextlib.contextmanager
def _noting_failures(members: Members) -> Iterator[tuple[Members, int]]:
    """Yields the members with their failures so far, which all of them know; counts another.

    What is written before `live` ends is read by all when it begins again. Those that came through
    a step in which others failed see by the count that they are to hand over too.
    """
    if jax.process_count() == 1:
        yield members, 0
        return
    store, folder = _store(), f"moejax/failures/{_key(members)}/"
    failures = sum(int(count) for _, count in store.key_value_dir_get(folder))
    try:
        yield members, failures
    except Exception:
        mine = f"{folder}{jax.process_index()}"
        before = dict(store.key_value_dir_get(folder)).get(mine, "0")
        store.key_value_set(mine, str(int(before) + 1), allow_overwrite=True)
        raise


def _ordered(alive: Sequence[jax.Device], members: Members, failures: int) -> list[jax.Device]:
    """The devices in an order that this job has not used yet for other incarnations of them.

    On CPU, communicators are found by their devices in order; those of a dead process, and those
    that broke when somebody was late, are never forgotten, and to meet there fails for ever.
    """
    devices = sorted(alive, key=lambda device: device.id)
    if jax.process_count() == 1:
        return devices
    store, group = _store(), ",".join(str(number) for number, _ in sorted(members))
    key = f"moejax/members/{group}/{_key(members)}"
    known = len(store.key_value_dir_get(f"moejax/members/{group}/"))
    try:
        store.key_value_set(key, str(known))
    except jax.errors.JaxRuntimeError:
        pass  # another process was faster; all members count the same
    generation = int(store.blocking_key_value_get(key, 10_000))
    orders = math.factorial(len(devices))
    check(
        generation < orders, f"{len(devices)} devices have met {orders} times; start the job anew"
    )
    place = (generation + failures // (TRIES * len(devices))) % orders
    return list(next(itertools.islice(itertools.permutations(devices), place, None)))


def _key(members: Members) -> str:
    return ",".join(f"{number}-{incarnation}" for number, incarnation in sorted(members))


def _store() -> Any:
    from jax._src import distributed  # no public way to the job's key-value store

    store = distributed.global_state.client
    assert store is not None
    return store
