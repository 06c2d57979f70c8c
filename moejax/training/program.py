"""What the training loop runs: one copy of the weights, or workers with copies of their own.

Both are a state, a compiled step with the same metrics, and the two trees of a checkpoint. `params`
of a checkpoint is a model that can be served: of workers, the mean of theirs.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from moejax.core.errors import InputError, check
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams, init_decoder
from moejax.sync.common import after_common_steps
from moejax.sync.config import SyncConfig
from moejax.sync.exchange import Exchange, make_exchange, sent_per_step
from moejax.training.config import TrainConfig
from moejax.training.sharding import check_mesh, state_shardings
from moejax.training.state import TrainState, init_state, train_step
from moejax.training.workers import (
    WorkerState,
    check_workers,
    consensus,
    init_workers,
    make_worker_step,
    worker_structs,
)

State = TrainState | WorkerState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One kind of training.

    Attributes:
        init: the state of a fresh run, on the mesh.
        abstract: its shapes and shardings.
        lower: of (state, tokens, progress), the step to be compiled; it donates the state.
        items: the trees of a checkpoint by name.
        restore: the state, from a function that reads items like those that it is given.
    """

    init: Callable[[], Any]
    abstract: Callable[[], Any]
    lower: Callable[[Any, Any, Any], jax.stages.Lowered]
    items: Callable[[Any], dict[str, Any]]
    restore: Callable[[Callable[[dict[str, Any]], dict[str, Any]]], Any]


def make_program(
    model: DecoderConfig, cfg: TrainConfig, mesh: Mesh | None, sync: SyncConfig
) -> Program:
    """The program that `sync` wants. Raises `InputError` where things do not fit together."""
    if sync.method == "none":
        if mesh is not None:
            check_mesh(mesh, model, cfg)
        return _one_copy(model, cfg, mesh)
    if mesh is None:
        raise InputError(f"sync.method={sync.method!r} wants a mesh, whose `data` are the workers")
    check_workers(mesh, model, cfg)
    return _workers(model, cfg, mesh, exchange_of(sync, model))


def check_program(mesh: Any, model: DecoderConfig, cfg: TrainConfig, sync: SyncConfig) -> None:
    """What `make_program` checks, of a mesh that may be abstract."""
    if sync.method == "none":
        check_mesh(mesh, model, cfg)
        return
    check_workers(mesh, model, cfg)
    exchange_of(sync, model)


def exchange_of(sync: SyncConfig, model: DecoderConfig) -> Exchange:
    """What workers with this model exchange."""
    exchange = make_exchange(sync, _shapes(model), ("data",))
    if sync.common_steps:
        exchange = after_common_steps(exchange, sync.common_steps, ("data",))
    return exchange


def sync_bytes(sync: SyncConfig, model: DecoderConfig, cfg: TrainConfig, mesh: Mesh) -> float:
    """Bytes that a device sends over `data` per step, on average over the plan's period.

    Of weights or gradients alone, after the common steps; metrics are 28 more.
    """
    check(sync.method != "none", "method='none' has no plan; `training.traffic` counts its bytes")
    shapes = _shapes(model)
    shardings = state_shardings(shapes, mesh, cfg)
    held = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(s.shard_shape(leaf.shape), leaf.dtype),
        shapes,
        shardings,
    )
    return sent_per_step(sync, held, mesh.shape["data"])


def weights(state: State) -> DecoderParams:
    """The model of a state: of workers, the mean of theirs."""
    return consensus(state) if isinstance(state, WorkerState) else state.params


def _shapes(model: DecoderConfig) -> DecoderParams:
    return jax.eval_shape(lambda: init_decoder(jax.random.key(0, impl="rbg"), model))


def _one_copy(model: DecoderConfig, cfg: TrainConfig, mesh: Mesh | None) -> Program:
    def abstract() -> TrainState:
        shapes = jax.eval_shape(lambda: init_state(model, cfg))
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        where = jax.tree.map(lambda _: one, shapes)
        if mesh is not None:
            where = state_shardings(shapes, mesh, cfg)
        return jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, where
        )

    def items(state: TrainState) -> dict[str, Any]:
        optimizer = {"opt_state": state.opt_state, "step": state.step}
        return {"params": state.params, "optimizer": optimizer}

    def restore(read: Callable[[dict[str, Any]], dict[str, Any]]) -> TrainState:
        restored = read(items(abstract()))
        return TrainState(params=restored["params"], **restored["optimizer"])

    return Program(
        init=lambda: init_state(model, cfg, mesh),
        abstract=abstract,
        lower=partial(train_step.lower, model=model, cfg=cfg, mesh=mesh),
        items=items,
        restore=restore,
    )


def _workers(model: DecoderConfig, cfg: TrainConfig, mesh: Mesh, exchange: Exchange) -> Program:
    abstract = partial(worker_structs, model, cfg, mesh, exchange)

    def items(state: WorkerState) -> dict[str, Any]:
        return {"params": consensus(state), "optimizer": {"workers": state}}

    def restore(read: Callable[[dict[str, Any]], dict[str, Any]]) -> WorkerState:
        return read({"optimizer": {"workers": abstract()}})["optimizer"]["workers"]

    return Program(
        init=partial(init_workers, model, cfg, mesh, exchange),
        abstract=abstract,
        lower=make_worker_step(model, cfg, mesh, exchange).lower,
        items=items,
        restore=restore,
    )
