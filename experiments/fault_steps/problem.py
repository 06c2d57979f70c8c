"""A regression whose step is a function of the global batch, whatever the mesh."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.elastic.alive import AXIS, run_alive

BATCH, DIM = 12, 4
START = {"w": np.zeros(DIM, np.float32), "momentum": np.zeros(DIM, np.float32),
         "loss": np.float32(0)}  # fmt: skip


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(step)
    x = rng.standard_normal((BATCH, DIM)).astype(np.float32)
    return x, x @ np.array([1, -2, 3, 0.5], np.float32) + 0.1 * rng.standard_normal(BATCH).astype(
        np.float32
    )


@functools.cache
def _update_on(mesh: Mesh):
    """Momentum descent, compiled once per mesh."""

    def update(state, x, y):
        def loss(w):
            return jnp.mean(jnp.square((x * w[None]).sum(1) - y))

        value, grad = jax.value_and_grad(loss)(state["w"])
        momentum = 0.9 * state["momentum"] + grad
        return {"w": state["w"] - 0.05 * momentum, "momentum": momentum, "loss": value}

    return jax.jit(update, out_shardings=NamedSharding(mesh, P()))


def train_step(mesh: Mesh, state: dict, step: int) -> dict:
    """One step of momentum descent; rows over the mesh, a number of devices that divides 12."""
    rows, everywhere = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())

    def place(value, sharding):
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    x, y = (place(part, rows) for part in batch(step))
    old = {name: place(np.asarray(leaf), everywhere) for name, leaf in state.items()}
    new = _update_on(mesh)(old, x, y)
    return {name: np.asarray(leaf.addressable_data(0)) for name, leaf in new.items()}


@contextlib.contextmanager
def three(devices):
    """Stands for `live_devices` where three devices of this process are always alive."""
    yield devices[:3]


@functools.cache
def unkilled(steps: int) -> list[dict]:
    """The state after every step of a run without faults, in this process."""
    states = [START]
    run_alive(
        jax.devices(), START, train_step, steps,
        live=three, completed=lambda step, state: states.append(state),
    )  # fmt: skip
    return states


def difference(got: dict, want: dict) -> float:
    """The largest, of weights, momentum and loss."""
    return max(float(np.abs(got[name] - want[name]).max()) for name in want)
