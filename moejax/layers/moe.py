"""The mixture-of-experts layer: route, expert stage, combine, metrics.

Axis letters:
    T  tokens    D  model dim    E  experts    K  experts per token
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.core.structs import MoEMetrics, Routing
from moejax.experts.combine import combine
from moejax.experts.gated import gated_mlp, init_experts
from moejax.experts.stage import Stage, resident
from moejax.kernels.grouped_ffn import GatedWeights, hidden_fn
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
        shared_gate: the shared expert's output is scaled by a sigmoid of the token (Qwen2-MoE).
        bias, activation: of the routed experts, see `GatedWeights`.
        weigh: whether a choice's weight scales what its expert gives, or what it gets (Llama 4).
        zero_experts: so many of the router's last experts return their input (LongCat-Flash,
            arXiv 2509.01322; MoE++, arXiv 2410.07348); they have no weights and are never moved.
    """

    d_ff: int
    router: RouterConfig
    shared_d_ff: int = 0
    shared_gate: bool = False
    bias: bool = False
    activation: Literal["silu", "gelu_tanh", "clamped_swiglu"] = "silu"
    weigh: Literal["output", "input"] = "output"
    zero_experts: int = 0

    def __post_init__(self):
        check(self.d_ff >= 1, f"d_ff={self.d_ff} must be at least 1")
        check(self.shared_d_ff >= 0, f"shared_d_ff={self.shared_d_ff} must not be negative")
        check(self.shared_d_ff > 0 or not self.shared_gate, "a shared_gate wants a shared expert")
        hidden_fn(self.activation)
        check(
            self.weigh in ("output", "input"), f"weigh={self.weigh!r} is neither output nor input"
        )
        zero, every = self.zero_experts, self.router.num_experts
        check(0 <= zero < every, f"zero_experts={zero} must be below num_experts={every}")

    @property
    def num_experts(self) -> int:
        """E, the experts that have weights."""
        return self.router.num_experts - self.zero_experts


@struct.dataclass(kw_only=True)
class MoEParams:
    """Weights of one MoE layer; `experts` is None where a stage brings its own."""

    router: RouterParams
    experts: GatedWeights | None  # [E, D, F], [E, D, F], [E, F, D]
    shared: GatedWeights | None = None  # [D, Fs], [D, Fs], [Fs, D]
    w_shared_gate: jax.Array | None = None  # [D]


def init_moe(
    key: jax.Array, d_model: int, cfg: MoEConfig, *, out_scale: float, dtype: jnp.dtype
) -> MoEParams:
    """Random weights; `out_scale` shrinks the residual branch."""
    k_router, k_experts, k_shared = jax.random.split(key, 3)
    shape = (cfg.num_experts,)
    kind = dict(bias=cfg.bias, activation=cfg.activation, out_scale=out_scale, dtype=dtype)
    shared = w_shared_gate = None
    if cfg.shared_gate:
        noise = jax.random.normal(jax.random.fold_in(k_shared, 3), (d_model,))
        w_shared_gate = (noise * d_model**-0.5).astype(dtype)
    if cfg.shared_d_ff:
        shared = init_experts(
            k_shared, (), d_model, cfg.shared_d_ff, out_scale=out_scale, dtype=dtype
        )
    return MoEParams(
        router=init_router(k_router, d_model, cfg.router),
        experts=init_experts(k_experts, shape, d_model, cfg.d_ff, **kind),
        shared=shared,
        w_shared_gate=w_shared_gate,
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
    check(
        not cfg.bias or parallel.model_axis is None,
        f"experts with biases cannot be split over the mesh axis {parallel.model_axis!r}",
    )
    routing = route(params.router, x, cfg.router, mask=mask, forced_idx=forced_idx)
    layer = jnp.asarray(layer, jnp.int32)
    tokens, x = x, parallel.split(x)
    run = _on_weighed_inputs(stage) if cfg.weigh == "input" else stage
    outputs, stage_state, counts = run(x, routing, params.experts, layer, stage_state)
    with jax.named_scope("moe_combine"):
        y = outputs if outputs.ndim == 2 else combine(outputs, routing.topk_weights)
    if params.shared is not None:
        with jax.named_scope("moe_shared"):
            y = y + _shared(params, x)
    y = parallel.merge(y)
    if cfg.zero_experts:
        y = y + _unchanged(tokens, routing, cfg)
    sums = routing_sums(routing, cfg.router, parallel.token_axes)
    metrics = MoEMetrics(
        expert_load=sums.load,
        load_balancing_loss=load_balancing_loss(sums),
        router_z_loss=router_z_loss(sums),
        **{f.name: getattr(counts, f.name) for f in dataclasses.fields(counts)},
    )
    return y, routing, stage_state, metrics


def _shared(params: MoEParams, x: jax.Array) -> jax.Array:
    """The shared expert on x [T, D], scaled by its gate where it has one."""
    assert params.shared is not None
    y = gated_mlp(params.shared, x)
    if params.w_shared_gate is None:
        return y
    return y * jax.nn.sigmoid(x @ params.w_shared_gate)[:, None]


def _unchanged(x: jax.Array, routing: Routing, cfg: MoEConfig) -> jax.Array:
    """What the experts without weights add: x [T, D] times the weights they were chosen with."""
    idx = routing.topk_idx
    zero = (idx >= cfg.num_experts) & (idx < cfg.router.num_experts)
    weight = jnp.where(zero, routing.topk_weights, 0.0).sum(-1, keepdims=True)
    return (x.astype(jnp.float32) * weight).astype(x.dtype)


def _on_weighed_inputs(stage: Stage) -> Stage:
    """`stage` on tokens scaled by the weight of each choice; gives combined rows [T, D]."""

    def run(x, routing, weights, layer, state):
        tokens, top_k = routing.topk_idx.shape
        scaled = x.astype(jnp.float32)[:, None] * routing.topk_weights[:, :, None]
        each = dataclasses.replace(
            routing,
            topk_idx=routing.topk_idx.reshape(-1, 1),
            topk_weights=jnp.ones((tokens * top_k, 1), jnp.float32),
            router_logits=jnp.repeat(routing.router_logits, top_k, axis=0),
        )
        rows = scaled.astype(x.dtype).reshape(tokens * top_k, -1)
        outputs, state, counts = stage(rows, each, weights, layer, state)
        outputs = outputs.reshape(tokens, top_k, -1)
        return combine(outputs, jnp.ones((tokens, top_k), jnp.float32)), state, counts

    return run
