"""Slots against plain loops; the moves are each other's transposes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.dispatch.slots import Capacity, assign_slots, collect, pack, spread

M, J, G, C, D = 7, 3, 4, 3, 2
GROUP = np.random.default_rng(0).integers(-1, G + 1, (M, J)).astype(np.int32)


def expected():
    """Source of every slot and slot of every pair, by loops."""
    source, slot = np.full(G * C, M * J), np.full((M, J), G * C)
    taken = [0] * G
    for n, group in enumerate(GROUP.reshape(-1)):
        if 0 <= group < G:
            if taken[group] < C:
                source[group * C + taken[group]] = n
                slot.reshape(-1)[n] = group * C + taken[group]
            taken[group] += 1
    return source, slot, sum(max(0, n - C) for n in taken)


def test_first_come_first_served_and_the_rest_is_counted():
    slots, overflow = assign_slots(jnp.asarray(GROUP), G, C)
    source, slot, lost = expected()
    np.testing.assert_array_equal(slots.source, source)
    np.testing.assert_array_equal(slots.slot, slot)
    assert overflow.sum() == lost > 0


def test_moves_and_their_gradients():
    slots, _ = assign_slots(jnp.asarray(GROUP), G, C)
    source, slot, _ = expected()
    matrix = np.zeros((G * C, M), np.float32)  # slots from rows
    pairs = np.zeros((G * C, M * J), np.float32)  # slots from pairs
    for s, n in enumerate(source):
        if n < M * J:
            matrix[s, n // J] = pairs[s, n] = 1
    x = jax.random.normal(jax.random.key(0), (M, D))
    y = jax.random.normal(jax.random.key(1), (G * C, D))
    packed, pack_vjp = jax.vjp(lambda x: pack(x, slots), x)
    collected, collect_vjp = jax.vjp(lambda y: collect(y, slots), y)
    apart, spread_vjp = jax.vjp(lambda y: spread(y, slots), y)
    np.testing.assert_array_equal(packed, matrix @ x)
    np.testing.assert_allclose(collected, matrix.T @ y, rtol=1e-6)
    np.testing.assert_array_equal(apart.reshape(-1, D), pairs.T @ y)
    np.testing.assert_allclose(pack_vjp(y)[0], matrix.T @ y, rtol=1e-6)
    np.testing.assert_array_equal(collect_vjp(x)[0], matrix @ x)
    np.testing.assert_array_equal(spread_vjp(apart)[0], pairs @ apart.reshape(-1, D))


def test_capacities():
    assert Capacity(slots=9).resolve(expected=1.0, bound=4) == 4
    assert Capacity(factor=1.5).resolve(expected=3.0, bound=64) == 5
    for wrong, message in [
        ({"slots": 2, "factor": 1.0}, "both slots=2 and factor=1.0"),
        ({"slots": 0}, "slots=0 is not a positive integer"),
        ({"factor": 0.0}, "factor=0.0 is not a positive number"),
    ]:
        with pytest.raises(InputError, match=message):
            Capacity(**wrong)  # pyrefly: ignore[bad-argument-type]
