"""The mixture-of-experts layer whose gate fills slots: expert choice and Soft MoE.

For encoders and for training objectives without a left-to-right order: what a token gets depends on
all tokens of its group (`moejax.routing.slot_choice`).

Axis letters:
    T  tokens of a group    D  model dim    E  experts    C  slots per expert
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.core.structs import MoEMetrics
from moejax.dispatch.expert_slots import expert_slots
from moejax.experts.gated import gated_mlp, init_experts
from moejax.experts.stage import Stage
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.layers.parallel import ALONE, Parallel
from moejax.routing.config import SlotConfig
from moejax.routing.losses import load_balancing_loss, router_z_loss
from moejax.routing.slot_choice import (
    SlotRouterParams,
    SlotRouting,
    init_slot_router,
    route_slots,
    slot_sums,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotMoEConfig:
    """Static description of one layer; `d_ff` and `shared_d_ff` as in `MoEConfig`."""

    d_ff: int
    router: SlotConfig
    shared_d_ff: int = 0

    def __post_init__(self):
        check(self.d_ff >= 1, f"d_ff={self.d_ff} must be at least 1")
        check(self.shared_d_ff >= 0, f"shared_d_ff={self.shared_d_ff} must not be negative")


@struct.dataclass(kw_only=True)
class SlotMoEParams:
    """Weights of one layer; experts as in `MoEParams`."""

    router: SlotRouterParams
    experts: GatedWeights | None  # [E, D, F], [E, D, F], [E, F, D]
    shared: GatedWeights | None = None  # [D, Fs], [D, Fs], [Fs, D]


def init_slot_moe(
    key: jax.Array, d_model: int, cfg: SlotMoEConfig, *, out_scale: float, dtype: jnp.dtype
) -> SlotMoEParams:
    """Random weights; `out_scale` shrinks the residual branch."""
    k_router, k_experts, k_shared = jax.random.split(key, 3)

    def gated(key: jax.Array, shape: tuple[int, ...], d_ff: int) -> GatedWeights:
        return init_experts(key, shape, d_model, d_ff, out_scale=out_scale, dtype=dtype)

    return SlotMoEParams(
        router=init_slot_router(k_router, d_model, cfg.router),
        experts=gated(k_experts, (cfg.router.num_experts,), cfg.d_ff),
        shared=gated(k_shared, (), cfg.shared_d_ff) if cfg.shared_d_ff else None,
    )


def slot_moe(
    params: SlotMoEParams,
    x: jax.Array,
    cfg: SlotMoEConfig,
    *,
    mask: jax.Array | None = None,
    stage: Stage | None = None,
    stage_state: Any = None,
    layer: jax.Array | int = 0,
    parallel: Parallel = ALONE,
) -> tuple[jax.Array, SlotRouting, Any, MoEMetrics]:
    """One layer on the group x [T, D].

    Args:
        mask: bool [T], False for padding; padded rows come out as the shared expert's alone.
        stage: an `expert_slots`, by default that of one device; `stage_state` is its carry,
            `layer` this layer's index.
        parallel: how arrays are split, when inside `shard_map`; a rank's tokens are a group.

    Returns: y [T, D], the routing, the stage's new state, metrics of this layer. There
    `expert_load` counts filled slots and `assignments_dropped` tokens that no expert took. Raises
    `InputError` for tokens over a mesh without a stage.
    """
    check(
        stage is not None or not parallel.token_axes,
        f"tokens over the mesh axes {parallel.token_axes} want a stage, such as expert_slots",
    )
    e = cfg.router.num_experts
    stage = stage or expert_slots(num_experts=e, axis=None, token_axes=())
    routing = route_slots(params.router, x, cfg.router, mask=mask)
    x = parallel.split(x)
    layer = jnp.asarray(layer, jnp.int32)
    y, stage_state, counts = stage(
        x,
        routing,  # pyrefly: ignore[bad-argument-type]
        params.experts,
        layer,
        stage_state,
    )
    if params.shared is not None:
        with jax.named_scope("moe_shared"):
            y = y + gated_mlp(params.shared, x)
    sums = slot_sums(routing, parallel.token_axes)
    metrics = MoEMetrics(
        expert_load=sums.load,
        load_balancing_loss=load_balancing_loss(sums),
        router_z_loss=router_z_loss(sums),
        **{f.name: getattr(counts, f.name) for f in dataclasses.fields(counts)},
    )
    return parallel.merge(y), routing, stage_state, metrics
