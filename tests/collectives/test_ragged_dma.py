"""Rows by remote DMA: what ranks send each other arrives, and its gradient comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.aot.compile import compile_for
from moejax.aot.targets import target_mesh
from moejax.collectives.ragged_dma import ragged_all_to_all_dma
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from tests.collectives.cases import races_found

R, T, WIDTH = 4, 8, 128
# Rows from each rank to each: none, one, three, and all that there is room for.
COUNTS = np.int32([[3, 0, 1, 2], [0, 0, 5, 1], [1, 7, 0, 0], [4, 1, 2, 1]])


def _offsets():
    """int32 [R, R] each: where a slice starts at its sender, and where it goes at its receiver."""
    starts = np.cumsum(COUNTS, 1) - COUNTS
    targets = np.cumsum(COUNTS, 0) - COUNTS
    return starts.astype(np.int32), targets.astype(np.int32)


def _exchange(interpret):
    def body(x, output, starts, targets, sent, received):
        return ragged_all_to_all_dma(
            x, output, starts[0], sent[0], targets[0], received[0],
            axis_name="expert", interpret=interpret,
        )  # fmt: skip

    return body


def test_rows_arrive_and_gradients_return():
    mesh, spec = make_mesh(expert=R), P("expert")
    body = _exchange(pltpu.InterpretParams(detect_races=True))
    run = jax.shard_map(body, mesh=mesh, in_specs=(spec,) * 6, out_specs=spec)
    x = np.random.default_rng(0).standard_normal((R, T, WIDTH)).astype(np.float32)
    output = np.full((R, 2 * T, WIDTH), 7, np.float32)
    starts, targets = _offsets()
    tables = (starts, targets, COUNTS, COUNTS.T.copy())

    @jax.jit
    def both(x, output):
        y, pullback = jax.vjp(lambda x, o: run(x, o, *tables), x, output)
        return y, pullback(2 * y)

    flat = x.reshape(-1, WIDTH), output.reshape(-1, WIDTH)
    got, (back, kept) = jax.tree.map(np.asarray, both(*flat))
    want, used = output.copy(), np.zeros((R, T), bool)
    for a in range(R):
        for b in range(R):
            rows = slice(starts[a, b], starts[a, b] + COUNTS[a, b])
            used[a, rows] = True
            want[b, targets[a, b] : targets[a, b] + COUNTS[a, b]] = x[a, rows]
    np.testing.assert_array_equal(got.reshape(want.shape), want)
    np.testing.assert_array_equal(back.reshape(x.shape), 2 * x * used[..., None])
    np.testing.assert_array_equal(kept.reshape(want.shape), 2 * want * (want == 7))
    assert not races_found()


@pytest.mark.full
@pytest.mark.parametrize("target", ["v5e:2x4", "v6e:2x4"])
def test_compiles_for_tpu(target):
    mesh, spec = target_mesh(target, expert=8), P("expert")
    sharding = NamedSharding(mesh, spec)
    rows = jax.ShapeDtypeStruct((8 * 512, 2048), jnp.bfloat16, sharding=sharding)
    table = jax.ShapeDtypeStruct((8, 8), jnp.int32, sharding=sharding)
    run = jax.shard_map(_exchange(None), mesh=mesh, in_specs=(spec,) * 6, out_specs=spec)
    found = compile_for(run, [rows, rows, *[table] * 4], donate_argnums=1)
    assert found.collectives == () and found.memory.device_temporaries < 2**20


def test_what_does_not_fit_is_refused():
    mesh, spec = make_mesh(expert=R), P("expert")
    run = jax.shard_map(_exchange(None), mesh=mesh, in_specs=(spec,) * 6, out_specs=spec)
    table = jnp.zeros((R, R), jnp.int32)
    with pytest.raises(InputError, match=r"multiple of 128 elements want .* \(8, 100\)"):
        jax.eval_shape(run, jnp.zeros((32, 100)), jnp.zeros((32, 100)), *[table] * 4)
    with pytest.raises(InputError, match="offsets and sizes want int32"):
        rows = jnp.zeros((32, 128))
        jax.eval_shape(run, rows, rows, *[table.astype(jnp.int16)] * 4)
