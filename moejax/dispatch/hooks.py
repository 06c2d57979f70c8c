"""Six places where a user's function may touch the rows of an MoE layer, by composition.

    before_moe_start ─► route ─► before_dispatch ─► travel ─► after_dispatch ─► experts
    before_moe_end ◄─ sum ◄─ after_combine ◄─ travel ◄─ before_combine ◄─┘

The hooks of FSMoE (arXiv 2501.10714, section 3.1), such as compressing rows before they travel and
decompressing them where they arrive. A dispatch strategy is a stage around a stage, so two hooks
stand around the outer one, two around the inner one, two around the layer. Hooks are traced: they
cost what they compute, and gradients flow through them.

Axis letters:
    M  rows: T tokens of this rank, or those that arrived here    K  experts per token
    D  model dim
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moejax.core.structs import Routing
from moejax.experts.stage import Stage, StageCounts, resident

Hook: TypeAlias = Callable[[jax.Array], jax.Array]


def unchanged(rows: jax.Array) -> jax.Array:
    """The hook that does nothing."""
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """Functions of rows [M, D]; dtype and D may change, if a later hook changes them back.

    Attributes:
        before_moe_start: what the layer is given, before the gate sees it.
        before_dispatch, after_dispatch: before rows travel, and where they arrived.
        before_combine, after_combine: outputs of the experts there ([M, K, D], or [M, D] where
            `inner` has summed them), and at home ([T, K, D] or [T, D], as the strategy returns).
        before_moe_end: what the layer returns.
    """

    before_moe_start: Hook = unchanged
    before_dispatch: Hook = unchanged
    after_dispatch: Hook = unchanged
    before_combine: Hook = unchanged
    after_combine: Hook = unchanged
    before_moe_end: Hook = unchanged


def hooked(dispatch: Callable[[Stage], Stage], hooks: Hooks, inner: Stage = resident) -> Stage:
    """A dispatch strategy and its inner stage with the four hooks around them.

    >>> from functools import partial
    >>> from moejax.dispatch.gather import gather
    >>> stage = hooked(partial(gather, num_experts=64), narrow_wire(jnp.bfloat16))
    """
    return hook_dispatch(dispatch(hook_inner(inner, hooks)), hooks)


def hook_dispatch(stage: Stage, hooks: Hooks) -> Stage:
    """`before_dispatch` and `after_combine` around a strategy."""
    return _between(hooks.before_dispatch, stage, hooks.after_combine)


def hook_inner(stage: Stage, hooks: Hooks) -> Stage:
    """`after_dispatch` and `before_combine` around the stage that a strategy wraps."""
    return _between(hooks.after_dispatch, stage, hooks.before_combine)


def hook_layer(layer: Callable[..., tuple], hooks: Hooks) -> Callable[..., tuple]:
    """`before_moe_start` and `before_moe_end` around `moe` or `slot_moe`, with their signature."""

    def run(params: Any, x: jax.Array, cfg: Any, **options: Any) -> tuple:
        y, *rest = layer(params, hooks.before_moe_start(x), cfg, **options)
        return hooks.before_moe_end(y), *rest

    return run


def narrow_wire(wire: DTypeLike, inside: DTypeLike = jnp.float32) -> Hooks:
    """Rows travel as `wire` both ways and are computed with as `inside`; so are their gradients.

    Strategies that add up partial sums on the way back (`gather`, `grouped`) do so in float32
    whatever the rows are, so there only the way out is narrow.
    """

    def narrow(rows: jax.Array) -> jax.Array:
        return rows.astype(wire)

    def widen(rows: jax.Array) -> jax.Array:
        return rows.astype(inside)

    return Hooks(
        before_dispatch=narrow, after_dispatch=widen, before_combine=narrow, after_combine=widen
    )


def _between(before: Hook, stage: Stage, after: Hook) -> Stage:
    def run(
        x: jax.Array, routing: Routing, weights: Any, layer: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, StageCounts]:
        y, state, counts = stage(before(x), routing, weights, layer, state)
        return after(y), state, counts

    return run
