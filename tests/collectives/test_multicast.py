"""Multicast kernels: what they lower to, what they refuse, and their use, with stand-ins for them.

They run on GPUs only. Compiled for eight H100s they are in `results/aot_collectives_h100.json`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.collectives import multicast
from moejax.collectives.multicast import multicast_all_gather, multicast_reduce_scatter
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh

AXES = ("expert",)


def there_and_back(x):
    return multicast_reduce_scatter(jnp.sin(multicast_all_gather(x, AXES)), AXES)


def plainly(x):
    return lax.psum_scatter(jnp.sin(lax.all_gather(x, AXES, tiled=True)), AXES, tiled=True)


def value_and_gradient(body, mesh):
    run = jax.shard_map(body, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES))

    def both(x):
        y, pullback = jax.vjp(run, x)
        return y, pullback(jnp.cos(y))

    return both


@pytest.mark.parametrize("shape", [(2, 1024), (3, 512)])  # of a rank; eight and three at a time
def test_each_is_one_kernel_for_gpus_and_so_is_its_gradient(shape):
    mesh = make_mesh(expert=8)
    rows = (8 * shape[0], shape[1])
    x = jax.ShapeDtypeStruct(rows, jnp.float32, sharding=NamedSharding(mesh, P(AXES)))
    step = jax.jit(value_and_gradient(there_and_back, mesh))
    text = step.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 4
    assert text.count('multimem_parameters = "0,0,1,1"') == 2  # stores rows in all memories
    assert '"stablehlo.all_gather"' not in text and '"stablehlo.reduce_scatter"' not in text


def test_values_and_gradients_with_native_collectives_in_their_place(monkeypatch):
    monkeypatch.setattr(
        multicast, "_all_gather", lambda x, axes, names: lax.all_gather(x, axes, tiled=True)
    )
    monkeypatch.setattr(
        multicast, "_reduce_scatter", lambda x, axes, names: lax.psum_scatter(x, axes, tiled=True)
    )
    mesh = make_mesh(expert=4)
    x = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    fns = [value_and_gradient(body, mesh) for body in (there_and_back, plainly)]
    got, want = jax.jit(lambda x: [fn(x) for fn in fns])(x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((2, 100), jnp.float32, "200 float32, are no whole transfers of 2048 bytes"),
        ((2, 1024), jnp.int32, "multicast takes bfloat16, float16, float32, not int32"),
        ((0, 1024), jnp.float32, "0 float32, are no whole transfers"),
    ],
)
def test_what_does_not_fit_is_refused(shape, dtype, message):
    run = partial(multicast_all_gather, axes=AXES)
    mapped = jax.shard_map(run, mesh=make_mesh(expert=2), in_specs=P(AXES), out_specs=P(AXES))
    with pytest.raises(InputError, match=message):
        jax.eval_shape(mapped, jax.ShapeDtypeStruct((2 * shape[0], shape[1]), dtype))


def test_it_reaches_all_devices_or_none():
    run = partial(multicast_reduce_scatter, axes=AXES)
    both = P(("data", "expert"))
    mapped = jax.shard_map(run, mesh=make_mesh(data=2, expert=2), in_specs=both, out_specs=both)
    x = jax.ShapeDtypeStruct((8, 1024), jnp.float32)
    with pytest.raises(InputError, match=r"axes \('expert',\) leave out \['data'\]"):
        jax.eval_shape(mapped, x)
    odd = jax.ShapeDtypeStruct((6, 1024), jnp.float32)
    mapped = jax.shard_map(run, mesh=make_mesh(expert=2), in_specs=P(AXES), out_specs=P(AXES))
    with pytest.raises(InputError, match="3 rows are not divisible by 2 ranks"):
        jax.eval_shape(mapped, odd)
