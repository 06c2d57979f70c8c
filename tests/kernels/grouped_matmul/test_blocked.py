"""The blocked grouped product against the reference, in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core.mesh import make_mesh
from moejax.kernels.grouped_matmul import blocked, reference
from tests.kernels.cases import (
    NUM_GROUPS,
    NUM_ROWS,
    SIZES,
    SKEWED,
    assert_close,
    empty_patterns,
    normal,
    value_and_grads,
)

K, N = 8, 12
blocked_matmul = functools.partial(blocked.grouped_matmul, sizes=SIZES)


@functools.cache
def compiled():
    return [value_and_grads(op) for op in (blocked_matmul, reference.grouped_matmul)]


def operands(key, dtype=jnp.float32, groups=NUM_GROUPS):
    return normal(key, (NUM_ROWS, K), (groups, K, N), (NUM_ROWS, N), dtype=dtype)


def test_every_pattern_of_empty_groups(key):
    lhs, rhs, ct = operands(key)
    fast, slow = compiled()
    for group_sizes in empty_patterns():
        got = jax.device_get(fast((lhs, rhs), group_sizes, ct))
        assert_close(got, slow((lhs, rhs), group_sizes, ct))
        used = int(group_sizes.sum())
        assert not np.any(got[0][used:]) and not np.any(got[1][0][used:])
        assert not np.any(got[1][1][group_sizes == 0])


@pytest.mark.parametrize("name", SKEWED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_skewed(key, name, dtype):
    lhs, rhs, ct = operands(key, dtype)
    group_sizes = jnp.asarray(SKEWED[name], jnp.int32)
    got, want = (run((lhs, rhs), group_sizes, ct) for run in compiled())
    assert got[0].dtype == got[1][0].dtype == dtype
    # bfloat16: one rounding of the result on either side.
    assert_close(got, want, 1e-5 if dtype == jnp.float32 else 2**-8)


@pytest.mark.parametrize("offset", [0, 2, 5])
def test_group_offset(key, offset):
    """rhs holds three of eight groups; the others' rows are zero, in value and gradient."""
    lhs, rhs, ct = operands(key, groups=3)
    group_sizes = jnp.asarray([4, 0, 3, 6, 0, 5, 1, 9], jnp.int32)

    def run(op, offset):
        fn = functools.partial(op, group_offset=offset)
        return value_and_grads(fn)((lhs, rhs), group_sizes, ct)

    got = run(blocked_matmul, jnp.int32(offset))
    assert_close(got, run(reference.grouped_matmul, jnp.int32(offset)))
    starts = np.concatenate([[0], np.cumsum(group_sizes)])
    mine = np.arange(NUM_ROWS)
    mine = (mine >= starts[offset]) & (mine < starts[offset + 3])
    assert np.any(got[0][mine]) and not np.any(got[0][~mine]) and not np.any(got[1][0][~mine])


def test_preferred_element_type_and_mixed_operands(key):
    lhs, rhs, _ = operands(key, jnp.bfloat16)
    group_sizes = jnp.asarray(SKEWED["first_is_large"], jnp.int32)
    wide = {"preferred_element_type": jnp.float32}
    got, want = (m.grouped_matmul(lhs, rhs, group_sizes, **wide) for m in (blocked, reference))
    assert got.dtype == want.dtype == jnp.float32
    assert_close(got, want)
    mixed = blocked.grouped_matmul(lhs.astype(jnp.float32), rhs, group_sizes)
    np.testing.assert_array_equal(mixed, got)


def test_vmap(key):
    lhs, rhs, ct = operands(key)
    patterns = jnp.asarray(list(SKEWED.values()), jnp.int32)
    many = jnp.stack([lhs + i for i in range(len(SKEWED))])
    got, want = (
        jax.jit(jax.vmap(run, ((0, None), 0, None)))((many, rhs), patterns, ct)
        for run in compiled()
    )
    assert_close(got, want)


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_shard_map_with_group_offset(key, axis_type):
    """Each of two ranks holds half of the groups and sees all rows; the sum is the whole."""
    lhs, rhs, ct = operands(key)
    group_sizes = jnp.asarray([3, 0, 9, 2, 5, 1, 0, 4], jnp.int32)
    mesh = make_mesh(expert=2, axis_type=axis_type)

    @jax.shard_map(mesh=mesh, in_specs=(P(), P("expert"), P()), out_specs=P())
    def sharded(lhs, rhs, group_sizes):
        offset = jax.lax.axis_index("expert") * rhs.shape[0]
        y = blocked_matmul(lhs, rhs, group_sizes, group_offset=offset)
        return jax.lax.psum(y, "expert")

    want = compiled()[1]((lhs, rhs), group_sizes, ct)
    rhs = jax.device_put(rhs, NamedSharding(mesh, P("expert")))
    lhs, group_sizes, ct = jax.device_put((lhs, group_sizes, ct), NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        assert_close(value_and_grads(sharded)((lhs, rhs), group_sizes, ct), want)


def test_non_finite_rows_stay_with_their_group(key):
    lhs, rhs, ct = operands(key)
    group_sizes = jnp.asarray([3, 5, 2, 6, 0, 0, 0, 0], jnp.int32)
    run, _ = compiled()
    clean = run((lhs, rhs), group_sizes, ct)
    dirty = run((lhs.at[5].set(jnp.nan), rhs), group_sizes, ct.at[6].set(jnp.inf))
    others = np.asarray([0, 2, 3])
    np.testing.assert_array_equal(clean[1][1][others], dirty[1][1][others])
    assert not np.isfinite(dirty[1][1][1]).all()
    rows = np.setdiff1d(np.arange(NUM_ROWS), [5, 6])
    np.testing.assert_array_equal(clean[0][rows], dirty[0][rows])
    np.testing.assert_array_equal(clean[1][0][rows], dirty[1][0][rows])
