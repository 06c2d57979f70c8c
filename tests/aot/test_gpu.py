"""Compiling for GPUs: what it refuses here. What it gives: `results/aot_dispatch_h100.json`."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.aot.gpu import compile_for_h100
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh


def argument(mesh):
    return jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, P()))


FIND_SPEC = importlib.util.find_spec


def without_plugin(name):
    """`find_spec` where there is no package `jax_plugins`."""
    if name.startswith("jax_plugins."):
        raise ModuleNotFoundError(name)
    return None if name == "jax_plugins" else FIND_SPEC(name)


def test_without_the_plugin_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", without_plugin)
    with pytest.raises(InputError, match="source scripts/gpu_compiler.sh"):
        compile_for_h100(jnp.sin, (argument(make_mesh(expert=2)),))


def test_arguments_of_two_meshes_are_refused():
    args = argument(make_mesh(expert=2)), argument(make_mesh(expert=4))
    with pytest.raises(InputError, match=r"want one mesh, got meshes of \[2, 4\] devices"):
        compile_for_h100(jnp.add, args)
