"""A layer with its own gate, over a mesh and on one device: values and gradients of both."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.layers.parallel import Parallel
from tests.dispatch.cases import Layout, specs


def random_like(tree, seed: int = 0):
    """Normal float32 leaves of the shapes of `tree`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32), tree)


def total_loss(y: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(y) * jnp.arange(1.0, y.shape[1] + 1)[None])


def loss(params, x, mask, *, layer, cfg, stage, token_axes=()):
    parallel = Parallel(token_axes=token_axes)
    y, _, _, metrics = layer(params, x, cfg, mask=mask, stage=stage, parallel=parallel)
    total = total_loss(y)
    return (jax.lax.psum(total, token_axes) if token_axes else total), (y, metrics)


def alone(layer, cfg, stage):
    """`(params, x, mask) -> ((loss, (y, metrics)), gradients)`."""
    fn = partial(loss, layer=layer, cfg=cfg, stage=stage)
    return jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))


def over_mesh(layer, cfg, stage, where: Layout, params):
    """The same on a mesh; `params` for its structure."""
    tokens = P(where.token_axes)
    in_specs = (specs(params, where), tokens, tokens)
    body = jax.shard_map(
        partial(loss, layer=layer, cfg=cfg, stage=stage, token_axes=where.token_axes),
        mesh=where.mesh,
        in_specs=in_specs,
        out_specs=(P(), (tokens, P())),
    )
    fn = jax.jit(jax.value_and_grad(body, argnums=(0, 1), has_aux=True))
    shardings = jax.tree.map(
        partial(NamedSharding, where.mesh), in_specs, is_leaf=lambda leaf: isinstance(leaf, P)
    )
    return lambda *args: jax.device_get(fn(*jax.device_put(args, shardings)))
