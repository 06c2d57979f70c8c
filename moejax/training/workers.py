"""Training by workers that keep weights of their own and synchronise them by a plan.

A worker is a coordinate of the `data` axis: a whole model, its experts and tokens spread over
`expert` as in `moejax.training.sharding`. Every leaf of the state has a leading axis of workers.
Gradients stop at the worker; what crosses `data` is what `Exchange` sends, so experts too are
reduced over their replicas only.

Letters:
    W  workers    B  batch of all workers    S  positions
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core.errors import check
from moejax.kernels.vma import vary_over
from moejax.layers.parallel import Parallel
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams, init_decoder
from moejax.routing.losses import load_imbalance
from moejax.sync.exchange import Exchange as Exchange
from moejax.training.balance import balance_routers
from moejax.training.config import TrainConfig
from moejax.training.loss import LossMetrics, train_loss
from moejax.training.optimizer import decayed, learning_rate
from moejax.training.sharding import TOKEN_AXES, check_mesh, state_specs
from moejax.training.state import StepMetrics


@struct.dataclass(kw_only=True)
class WorkerState:
    """All arrays of a run; every leaf [W, ...]."""

    params: DecoderParams
    opt_state: Any
    gradients_state: Any
    weights_state: Any


def check_workers(mesh: Mesh, model: DecoderConfig, cfg: TrainConfig) -> None:
    """Raises `InputError` where workers of their own do not fit the mesh or the config."""
    check(not cfg.fully_sharded, "workers keep whole copies: fully_sharded=True does not fit")
    check(
        cfg.experts_memory == "device",
        f"workers keep experts on the device: experts_memory={cfg.experts_memory!r} does not fit",
    )
    axes = cfg.dispatch.axes
    check(
        "data" not in axes,
        f"experts of a worker are its own: dispatch over {axes} does not fit, over_data=False does",
    )
    check_mesh(mesh, model, cfg)


def init_workers(
    model: DecoderConfig, cfg: TrainConfig, mesh: Mesh, exchange: Exchange
) -> WorkerState:
    """The same random weights for all workers, over the mesh: those of `init_state`."""
    check_workers(mesh, model, cfg)
    # The bits of a sharded rbg draw depend on the mesh, so one device makes all.
    one = jax.jit(lambda: _init_one(model, cfg, exchange))()
    return spread(one, worker_shardings(model, cfg, mesh, exchange))


def spread(one: WorkerState, shardings: WorkerState) -> WorkerState:
    """A worker's state, leaves without W, to all workers."""
    within = jax.tree.map(lambda s: NamedSharding(s.mesh, P(*s.spec[1:])), shardings)
    workers = jax.tree.leaves(shardings)[0].mesh.shape["data"]

    def copy(tree: WorkerState) -> WorkerState:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (workers, *leaf.shape)), tree)

    return jax.jit(copy, out_shardings=shardings)(jax.device_put(one, within))


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


def worker_structs(
    model: DecoderConfig, cfg: TrainConfig, mesh: Mesh, exchange: Exchange
) -> WorkerState:
    """Shapes and shardings of the state."""
    workers = mesh.shape["data"]
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            (workers, *leaf.shape), leaf.dtype, sharding=sharding
        ),
        jax.eval_shape(partial(_init_one, model, cfg, exchange)),
        worker_shardings(model, cfg, mesh, exchange),
    )


def make_worker_step(
    model: DecoderConfig, cfg: TrainConfig, mesh: Mesh, exchange: Exchange
) -> jax.stages.Wrapped:
    """The compiled step (state, tokens int32 [B, S + 1], progress) to (state, metrics).

    The state is donated. Correction biases of routers follow the load of all workers. Metrics are
    means over workers (drops their sum), which costs an all-reduce of 28 bytes over `data` in every
    step. Raises `InputError` as `check_workers` does.
    """
    check_workers(mesh, model, cfg)
    specs = _specs(model, cfg, mesh, exchange)
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
        (loss, metrics), grads = grad_fn(one.params, tokens)
        lr = learning_rate(progress, cfg)
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
            new, norm = _update(one, grads, lr, cfg, exchange)
        load = jax.lax.psum(vary_over(("data",), metrics.expert_load), "data")
        new = dataclasses.replace(new, params=balance_routers(new.params, load, cfg.bias_rate))
        new = jax.tree.map(lambda leaf: leaf[None], new)
        return new, _step_metrics(loss, metrics, norm, lr)

    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(specs, P(TOKEN_AXES), P()), out_specs=(specs, P())
    )
    return jax.jit(mapped, donate_argnums=0)


def _update(
    one: WorkerState, grads: Any, lr: jax.Array, cfg: TrainConfig, exchange: Exchange
) -> tuple[WorkerState, jax.Array]:
    """A worker's state after its step, and the norm of its gradients before clipping."""
    old: Any = one.params
    grads, gradients_state = exchange.gradients.update(grads, one.gradients_state, old)
    norm = worker_norm(grads)
    scale = jnp.minimum(1.0, cfg.clip_norm / norm)
    grads = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), grads)
    updates, opt_state = _inner(cfg).update(grads, one.opt_state, old)
    updates = jax.tree.map(lambda u, p: (-lr * u).astype(p.dtype), updates, old)
    updates, weights_state = exchange.weights.update(updates, one.weights_state, old)
    params: Any = optax.apply_updates(old, updates)
    new = WorkerState(
        params=params,
        opt_state=opt_state,
        gradients_state=gradients_state,
        weights_state=weights_state,
    )
    return new, norm


def _step_metrics(
    loss: jax.Array, metrics: LossMetrics, norm: jax.Array, lr: jax.Array
) -> StepMetrics:
    """Means over workers, inside `shard_map`."""
    values = {
        "loss": loss,
        "cross_entropy": metrics.cross_entropy,
        "load_balancing_loss": metrics.load_balancing_loss,
        "router_z_loss": metrics.router_z_loss,
        "load_imbalance": load_imbalance(metrics.expert_load).mean(),
        "grad_norm": norm,
    }
    varying, dropped = vary_over(("data",), (values, metrics.assignments_dropped))
    means = jax.lax.pmean(jnp.stack(list(varying.values())), "data")
    return StepMetrics(
        **dict(zip(varying, means, strict=True)),
        assignments_dropped=jax.lax.psum(dropped, "data"),
        learning_rate=lr,
    )


@jax.jit
def consensus(state: WorkerState) -> DecoderParams:
    """The mean of the workers' weights: the model to evaluate, and what a checkpoint serves."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32).mean(0).astype(leaf.dtype), state.params
    )
