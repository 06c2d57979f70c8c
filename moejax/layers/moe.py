"""The mixture-of-experts layer: route, expert stage, combine, metrics.

Axis letters:
    T  tokens    D  model dim    E  experts    K  experts per token
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.core.structs import MoEMetrics, Routing
from moejax.experts.combine import combine
from moejax.experts.gated import gated_mlp, init_experts
from moejax.experts.stage import Stage, resident
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.layers.parallel import ALONE, Parallel
from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams, init_router, route
from moejax.routing.losses import load_balancing_loss, router_z_loss, routing_sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Static description of one MoE layer.

    Attributes:
        d_ff: hidden dim of a routed expert.
        shared_d_ff: hidden dim of the always-on shared expert, 0 for none. Several shared experts
            of DeepSeek's kind are one of their summed width.
    """

    d_ff: int
    router: RouterConfig
    shared_d_ff: int = 0

    def __post_init__(self):
        check(self.d_ff >= 1, f"d_ff={self.d_ff} must be at least 1")
        check(self.shared_d_ff >= 0, f"shared_d_ff={self.shared_d_ff} must not be negative")


@struct.dataclass(kw_only=True)
class MoEParams:
    """Weights of one MoE layer; `experts` is None where a stage brings its own."""

    router: RouterParams
    experts: GatedWeights | None  # [E, D, F], [E, D, F], [E, F, D]
    shared: GatedWeights | None = None  # [D, Fs], [D, Fs], [Fs, D]


def init_moe(
    key: jax.Array, d_model: int, cfg: MoEConfig, *, out_scale: float, dtype: jnp.dtype
) -> MoEParams:
    """Random weights; `out_scale` shrinks the residual branch."""
    k_router, k_experts, k_shared = jax.random.split(key, 3)
    shape = (cfg.router.num_experts,)
    shared = None
    if cfg.shared_d_ff:
        shared = init_experts(
            k_shared, (), d_model, cfg.shared_d_ff, out_scale=out_scale, dtype=dtype
        )
    return MoEParams(
        router=init_router(k_router, d_model, cfg.router),
        experts=init_experts(k_experts, shape, d_model, cfg.d_ff, out_scale=out_scale, dtype=dtype),
        shared=shared,
    )


def moe(
    params: MoEParams,
    x: jax.Array,
    cfg: MoEConfig,
    *,
    mask: jax.Array | None = None,
    forced_idx: jax.Array | None = None,
    stage: Stage = resident,
    stage_state: Any = None,
    layer: jax.Array | int = 0,
    parallel: Parallel = ALONE,
) -> tuple[jax.Array, Routing, Any, MoEMetrics]:
    """One MoE layer on x [T, D].

    Args:
        mask: bool [T], False for padding; padded rows come out as the shared expert's alone.
        forced_idx: int32 [T, K], replays a recorded choice.
        stage: how tokens meet experts; `stage_state` is its carry, `layer` this layer's index.
        parallel: how arrays are split, when inside `shard_map`.

    Returns: y [T, D], the routing, the stage's new state, metrics of this layer.
    """
    routing = route(params.router, x, cfg.router, mask=mask, forced_idx=forced_idx)
    layer = jnp.asarray(layer, jnp.int32)
    x = parallel.split(x)
    outputs, stage_state, counts = stage(x, routing, params.experts, layer, stage_state)
    with jax.named_scope("moe_combine"):
        y = outputs if outputs.ndim == 2 else combine(outputs, routing.topk_weights)
    if params.shared is not None:
        with jax.named_scope("moe_shared"):
            y = y + gated_mlp(params.shared, x)
    y = parallel.merge(y)
    sums = routing_sums(routing, cfg.router, parallel.token_axes)
    metrics = MoEMetrics(
        expert_load=sums.load,
        load_balancing_loss=load_balancing_loss(sums),
        router_z_loss=router_z_loss(sums),
        **{f.name: getattr(counts, f.name) for f in dataclasses.fields(counts)},
    )
    return y, routing, stage_state, metrics
