"""Options with which dispatch overlaps: the CPU has none, the compilers here know the others."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.aot.compile import abstract, compile_for
from moejax.aot.targets import target_mesh
from moejax.dispatch.overlap import overlap_options


def test_cpu_needs_none():
    assert overlap_options("cpu") == {}


@pytest.mark.parametrize("options", [{}, overlap_options("tpu")], ids=["default", "options"])
def test_on_tpu_an_all_to_all_is_asynchronous_with_them_alone(options):
    mesh = target_mesh("v5e:2x2", expert=4)

    def swap(x, w):
        return jax.lax.all_to_all(x, "expert", 0, 0, tiled=True), w @ w

    specs = (P("expert"), P())
    body = jax.shard_map(swap, mesh=mesh, in_specs=specs, out_specs=specs)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2048, 1024), (1024, 1024))]
    args = [abstract(x, NamedSharding(mesh, spec)) for x, spec in zip(shapes, specs, strict=True)]
    found = compile_for(body, args, compiler_options=options or None).collectives
    assert [(one.kind, one.is_async) for one in found] == [("all-to-all", bool(options))]
