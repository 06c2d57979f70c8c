"""Training by workers that keep weights of their own and synchronise them by a plan.

A worker is a coordinate of the `data` axis: a whole model, its experts and tokens spread over
`expert` as in `moejax.training.sharding`. Every leaf of the state has a leading axis of workers.
Gradients stop at the worker; what crosses `data` is what `Exchange` sends, so experts too are
reduced over their replicas only.

Letters:
    W  workers    B  batch of all workers    S  positions
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core.errors import check
from moejax.layers.parallel import Parallel
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams, init_decoder
from moejax.training.config import TrainConfig
from moejax.training.loss import train_loss
from moejax.training.optimizer import decayed, learning_rate
from moejax.training.sharding import TOKEN_AXES, state_specs


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What workers tell each other: gradients before the optimizer, weights after it, or neither.

    Attributes:
        gradients: such as `sync.transform.reduce_gradients`.
        weights: such as `sync.transform.synchronise`.
    """

    gradients: optax.GradientTransformation = optax.identity()
    weights: optax.GradientTransformation = optax.identity()


@struct.dataclass(kw_only=True)
class WorkerState:
    """All arrays of a run; every leaf [W, ...]."""

    params: DecoderParams
    opt_state: Any
    gradients_state: Any
    weights_state: Any


def init_workers(
    model: DecoderConfig, cfg: TrainConfig, mesh: Mesh, exchange: Exchange
) -> WorkerState:
    """The same random weights for all workers, over the mesh."""
    check(not cfg.fully_sharded, "workers keep whole copies: fully_sharded=True does not fit")
    workers = mesh.shape["data"]

    def make() -> WorkerState:
        one = _init_one(model, cfg, exchange)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (workers, *leaf.shape)), one)

    return jax.jit(make, out_shardings=worker_shardings(model, cfg, mesh, exchange))()


def _init_one(model: DecoderConfig, cfg: TrainConfig, exchange: Exchange) -> WorkerState:
    params = init_decoder(jax.random.key(cfg.seed, impl="rbg"), model)
    tree: Any = params
    return WorkerState(
        params=params,
        opt_state=_inner(cfg).init(tree),
        gradients_state=exchange.gradients.init(tree),
        weights_state=exchange.weights.init(tree),
    )


def _inner(cfg: TrainConfig) -> optax.GradientTransformation:
    """`make_optimizer` without its clipping, which knows nothing of sharded experts."""
    return optax.chain(
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
    )


def worker_norm(grads: Any) -> jax.Array:
    """float32 []: global norm of a worker's gradients, inside `shard_map`.

    Squares of leaves that are sharded over further axes are summed over these.
    """
    squares: dict[frozenset, jax.Array] = {}
    for leaf in jax.tree.leaves(grads):
        axes = jax.typeof(leaf).manual_axis_type.varying - {"data"}
        square = jnp.square(leaf.astype(jnp.float32)).sum()
        squares[axes] = squares[axes] + square if axes in squares else square
    sums = (jax.lax.psum(x, tuple(axes)) if axes else x for axes, x in squares.items())
    return jnp.sqrt(sum(sums, jnp.float32(0)))


def _specs(model: DecoderConfig, cfg: TrainConfig, mesh: Mesh, exchange: Exchange) -> WorkerState:
    one = jax.eval_shape(partial(_init_one, model, cfg, exchange))
    specs = state_specs(one, mesh, cfg)
    return jax.tree.map(lambda spec: P("data", *spec), specs, is_leaf=lambda x: isinstance(x, P))


def worker_shardings(
    model: DecoderConfig, cfg: TrainConfig, mesh: Mesh, exchange: Exchange
) -> WorkerState:
    """A `NamedSharding` per leaf; for checkpoints too."""
    specs = _specs(model, cfg, mesh, exchange)
    is_spec = lambda x: isinstance(x, P)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def make_worker_step(
    model: DecoderConfig, cfg: TrainConfig, mesh: Mesh, exchange: Exchange
) -> Callable[[WorkerState, jax.Array, jax.Array], tuple[WorkerState, jax.Array]]:
    """The compiled step (state, tokens int32 [B, S + 1], progress) to (state, nats [W]).

    The state is donated. Raises `InputError` when the batch does not divide over the mesh.
    """
    ranks = mesh.shape["data"] * mesh.shape["expert"]
    check(
        cfg.batch_size % ranks == 0,
        f"batch_size={cfg.batch_size} is not divisible by data * expert = {ranks} ranks",
    )
    specs, inner = _specs(model, cfg, mesh, exchange), _inner(cfg)
    router = model.moe.router
    loss_fn = partial(
        train_loss,
        model=model,
        cfg=cfg,
        stage=cfg.dispatch.stage(model.moe.num_experts, router.gate, ("expert",)),
        parallel=Parallel(token_axes=("expert",), model_axis="model"),
    )

    def body(state: WorkerState, tokens: jax.Array, progress: jax.Array):
        one = jax.tree.map(lambda leaf: leaf[0], state)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (_, metrics), grads = grad_fn(one.params, tokens)
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
            old: Any = one.params
            grads, gradients_state = exchange.gradients.update(grads, one.gradients_state, old)
            scale = jnp.minimum(1.0, cfg.clip_norm / worker_norm(grads))
            grads = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), grads)
            updates, opt_state = inner.update(grads, one.opt_state, old)
            lr = learning_rate(progress, cfg)
            updates = jax.tree.map(lambda u, p: (-lr * u).astype(p.dtype), updates, old)
            updates, weights_state = exchange.weights.update(updates, one.weights_state, old)
            params: Any = optax.apply_updates(old, updates)
        new = WorkerState(
            params=params,
            opt_state=opt_state,
            gradients_state=gradients_state,
            weights_state=weights_state,
        )
        return jax.tree.map(lambda leaf: leaf[None], (new, metrics.cross_entropy))

    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(specs, P(TOKEN_AXES), P()), out_specs=(specs, P("data"))
    )
    return jax.jit(mapped, donate_argnums=0)


@jax.jit
def consensus(state: WorkerState) -> DecoderParams:
    """The mean of the workers' weights: the model to evaluate."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32).mean(0).astype(leaf.dtype), state.params
    )
