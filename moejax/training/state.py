"""The state of a training run and its compiled step."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams, init_decoder
from moejax.routing.losses import load_imbalance
from moejax.training.balance import balance_routers
from moejax.training.config import TrainConfig
from moejax.training.loss import train_loss
from moejax.training.optimizer import learning_rate, make_optimizer
from moejax.training.sharding import sharded_loss, state_shardings


@struct.dataclass(kw_only=True)
class TrainState:
    """All arrays of a run.

    There is no random key: nothing in a step is random but the batch, which is a function of
    (seed, step).
    """

    params: DecoderParams
    opt_state: optax.OptState
    step: jax.Array  # int32 [], steps taken


@struct.dataclass(kw_only=True)
class StepMetrics:
    """What one step saw, before its update; a scalar each, float32 unless said."""

    loss: jax.Array
    cross_entropy: jax.Array  # nats per token
    load_balancing_loss: jax.Array
    router_z_loss: jax.Array
    load_imbalance: jax.Array  # busiest expert over the mean, averaged over layers
    assignments_dropped: jax.Array  # int32, of all layers
    grad_norm: jax.Array  # before clipping
    learning_rate: jax.Array


def init_state(model: DecoderConfig, cfg: TrainConfig, mesh: Mesh | None = None) -> TrainState:
    """Random weights from `cfg.seed` and an empty optimizer; the same values on every mesh.

    The whole state is made on one device, which must hold it, then spread over the mesh.
    """
    # The bits of a sharded rbg draw depend on the mesh.
    state = _init_state(model, cfg)
    return _move(state, mesh, cfg)


@partial(jax.jit, static_argnames=("model", "cfg"))
def _init_state(model: DecoderConfig, cfg: TrainConfig) -> TrainState:
    # On CPU a threefry draw takes a second to compile and a decoder makes a dozen; rbg a fifth.
    params = init_decoder(jax.random.key(cfg.seed, impl="rbg"), model)
    opt_state = make_optimizer(cfg).init(params)  # pyrefly: ignore[bad-argument-type]
    return TrainState(params=params, opt_state=opt_state, step=jnp.int32(0))


@partial(jax.jit, static_argnames=("model", "cfg", "mesh"), donate_argnames="state")
def train_step(
    state: TrainState,
    tokens: jax.Array,
    progress: jax.Array,
    model: DecoderConfig,
    cfg: TrainConfig,
    mesh: Mesh | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One update from tokens int32 [B, S + 1] at `progress` (float32 []) of the run.

    With a mesh the state is sharded as `state_shardings` says. Cost with experts in host memory:
    they and their optimizer state cross the link once in each direction.
    """
    state = _move(state, mesh, dataclasses.replace(cfg, experts_memory="device"))
    loss_fn = train_loss if mesh is None else partial(sharded_loss, mesh=mesh)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, metrics), grads = grad_fn(state.params, tokens, model=model, cfg=cfg)
    lr = learning_rate(progress, cfg)
    with jax.named_scope("optimizer"):
        # optax raises a float to an int32 count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            # pyrefly: ignore[bad-argument-type]
            updates, opt_state = make_optimizer(cfg).update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - (lr * u).astype(p.dtype), state.params, updates)
        params = balance_routers(params, metrics.expert_load, cfg.bias_rate)
    step_metrics = StepMetrics(
        loss=loss,
        cross_entropy=metrics.cross_entropy,
        load_balancing_loss=metrics.load_balancing_loss,
        router_z_loss=metrics.router_z_loss,
        load_imbalance=load_imbalance(metrics.expert_load).mean(),
        assignments_dropped=metrics.assignments_dropped,
        grad_norm=optax.tree.norm(grads),
        learning_rate=lr,
    )
    state = TrainState(params=params, opt_state=opt_state, step=state.step + 1)
    return _move(state, mesh, cfg), step_metrics


def _move(state: TrainState, mesh: Mesh | None, cfg: TrainConfig) -> TrainState:
    return state if mesh is None else jax.device_put(state, state_shardings(state, mesh, cfg))
