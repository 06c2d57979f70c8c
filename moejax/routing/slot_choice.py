"""Gates that fill the slots of experts: expert choice and Soft MoE.

    tokens [T, D] ─► to_slots ─► [E, C, D] ─► experts ─► [E, C, D] ─► from_slots ─► [T, D]

Expert choice (arXiv 2202.09368, section 3): every expert takes its C best tokens, so loads are
equal, and a token is served by none to all of the experts. Soft MoE (arXiv 2308.00951, section 2):
a slot is a weighted mean of all tokens, a token a weighted mean of all slots. The tokens given to
one call are one *group*: they compete for its slots. What a token gets depends on its group, on
later tokens too, so neither gate is causal. Both run in float32. Padding is never chosen, weighs
nothing in any mean and comes out as zero.

Axis letters:
    T  tokens of a group    D  model dim    E  experts    C  slots per expert
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.kernels.vma import vary_together
from moejax.routing.config import ExpertChoiceConfig, SlotConfig, SoftConfig
from moejax.routing.gates import unit
from moejax.routing.losses import RoutingSums


@struct.dataclass(kw_only=True)
class SlotRouterParams:
    """Weights of a gate that fills slots, always float32."""

    w_router: jax.Array  # [D, E] for expert choice, [D, E, C] for soft
    scale: jax.Array | None = None  # [], of the soft logits


@struct.dataclass(kw_only=True)
class ExpertChoice:
    """Which token every slot holds. An empty slot has `token_idx == T` and weight 0."""

    token_idx: jax.Array  # int32 [E, C], best first
    weights: jax.Array  # float32 [E, C]
    valid: jax.Array  # bool [T], False for padding
    router_logits: jax.Array  # float32 [T, E]


@struct.dataclass(kw_only=True)
class SoftChoice:
    """How much of every token is in every slot, and of every slot in every token."""

    to_slot: jax.Array  # float32 [T, E, C], sums to 1 over T
    to_token: jax.Array  # float32 [T, E, C], sums to 1 over (E, C) for valid tokens
    valid: jax.Array  # bool [T], False for padding
    router_logits: jax.Array  # float32 [T, E, C]


SlotRouting: TypeAlias = ExpertChoice | SoftChoice


def init_slot_router(key: jax.Array, d_model: int, cfg: SlotConfig) -> SlotRouterParams:
    """Normal weights of variance 1 / d_model, and a scale of 1."""
    soft = isinstance(cfg, SoftConfig)
    shape = (d_model, cfg.num_experts, *((cfg.slots_per_expert,) if soft else ()))
    return SlotRouterParams(
        w_router=jax.random.normal(key, shape, jnp.float32) * d_model**-0.5,
        scale=jnp.float32(1.0) if soft else None,
    )


def route_slots(
    params: SlotRouterParams, x: jax.Array, cfg: SlotConfig, *, mask: jax.Array | None = None
) -> SlotRouting:
    """Fills all experts' slots from the group x [T, D]; bool `mask` [T] is False for padding."""
    check(x.shape[0] >= 1, "a group of 0 tokens cannot fill slots")
    _, valid = vary_together(x, jnp.ones(x.shape[:1], bool) if mask is None else mask)
    with jax.named_scope("moe_route"):
        if isinstance(cfg, ExpertChoiceConfig):
            return choose_tokens(params, x, cfg, valid)
        return mix_tokens(params, x, valid)


def choose_tokens(
    params: SlotRouterParams, x: jax.Array, cfg: ExpertChoiceConfig, valid: jax.Array
) -> ExpertChoice:
    """Softmax over experts, then the C best valid tokens of each; ties to the earlier token."""
    logits = x.astype(jnp.float32) @ params.w_router
    score = jnp.where(valid[:, None], jax.nn.softmax(logits, axis=1), -1.0)
    weights, idx = jax.lax.top_k(score.T, cfg.slots(x.shape[0]))
    taken = valid[idx]
    return ExpertChoice(
        token_idx=jnp.where(taken, idx, x.shape[0]).astype(jnp.int32),
        weights=jnp.where(taken, weights, 0.0),
        valid=valid,
        router_logits=logits,
    )


def mix_tokens(params: SlotRouterParams, x: jax.Array, valid: jax.Array) -> SoftChoice:
    """Softmax over tokens, and over slots, of scaled cosines between tokens and slots."""
    assert params.scale is not None, "a soft gate has a scale"
    directions = params.scale * unit(params.w_router, axis=0)
    logits = jnp.einsum("td,dec->tec", unit(x.astype(jnp.float32), axis=1), directions)
    live = valid[:, None, None]
    # Not -inf: a group of padding alone would be 0 / 0.
    to_slot = jax.nn.softmax(jnp.where(live, logits, -1e30), axis=0)
    return SoftChoice(
        to_slot=jnp.where(live, to_slot, 0.0),
        to_token=jnp.where(live, jax.nn.softmax(logits, axis=(1, 2)), 0.0),
        valid=valid,
        router_logits=logits,
    )


def to_slots(routing: SlotRouting, x: jax.Array) -> jax.Array:
    """What the experts get: [E, C, D] of x [T, D], in its dtype; empty slots are zero.

    Cost: a gather of E * C rows, or (soft) T * E * C * D multiply-adds.
    """
    if isinstance(routing, ExpertChoice):
        return x.at[routing.token_idx].get(mode="fill", fill_value=0)
    weights = routing.to_slot.astype(x.dtype)
    rows = jnp.einsum("tec,td->ecd", weights, x, preferred_element_type=jnp.float32)
    return rows.astype(x.dtype)


def from_slots(routing: SlotRouting, y: jax.Array) -> jax.Array:
    """What the tokens get: [T, D] of the experts' outputs y [E, C, D], summed in float32.

    Cost: a scatter-add of E * C rows, or (soft) T * E * C * D multiply-adds.
    """
    if isinstance(routing, SoftChoice):
        weights = routing.to_token.astype(y.dtype)
        out = jnp.einsum("tec,ecd->td", weights, y, preferred_element_type=jnp.float32)
        return out.astype(y.dtype)
    rows = y.astype(jnp.float32) * routing.weights[:, :, None]
    out = jnp.zeros((routing.valid.shape[0], y.shape[2]), jnp.float32)
    return out.at[routing.token_idx].add(rows, mode="drop").astype(y.dtype)


def filled_slots(routing: SlotRouting) -> jax.Array:
    """bool [E, C]: slots that hold something. The others want no expert."""
    if isinstance(routing, ExpertChoice):
        return routing.token_idx < routing.valid.shape[0]
    return jnp.broadcast_to(routing.valid.any(), routing.to_slot.shape[1:])


def unserved_tokens(routing: SlotRouting) -> jax.Array:
    """int32 []: valid tokens that no expert took; they leave the layer as zero."""
    if isinstance(routing, SoftChoice):
        return jnp.int32(0)
    taken = jnp.zeros(routing.valid.shape, bool).at[routing.token_idx].set(True, mode="drop")
    return jnp.sum(routing.valid & ~taken, dtype=jnp.int32)


def slot_sums(routing: SlotRouting, axes: tuple[str, ...] = ()) -> RoutingSums:
    """The sums of `routing_sums`, with filled slots as load. Cost: the same all-reduce."""
    logits = routing.router_logits.reshape(routing.valid.shape[0], -1)
    share = jax.nn.softmax(logits, axis=1).reshape(routing.router_logits.shape)
    if isinstance(routing, SoftChoice):
        share = share.sum(2)
    squared_z = jnp.square(jax.nn.logsumexp(logits, axis=1))
    sums = RoutingSums(
        load=filled_slots(routing).sum(1, dtype=jnp.int32),
        tokens=routing.valid.sum(dtype=jnp.int32),
        share=jnp.where(routing.valid[:, None], share, 0.0).sum(0),
        squared_z=jnp.where(routing.valid, squared_z, 0.0).sum(),
    )
    return jax.lax.psum(sums, axes) if axes else sums
